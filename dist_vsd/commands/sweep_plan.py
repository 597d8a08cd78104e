"""`dist-vsd sweep plan`: a sweep's directory from a file of prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dist_vsd.commands.arguments import parse
from dist_vsd.writable import require_writable_folder

if TYPE_CHECKING:
    from dist_vsd.sweep.prompts import Prompt

DESCRIPTION = """Plan a run for each prompt, seed and setting. Nothing runs yet; planning again adds only what is new.

  dist-vsd sweep plan prompts.txt --seeds 0,1 --set objective=vsd,sds --set score.rank=4,8
  dist-vsd sweep plan prompts.txt --set-together objective=vsd,sds guidance_scale=7.5,30

Prompts: .txt, one a line; .csv with a column prompt and, as you like, negative_prompt, tags (with commas between) and columns named
as options of `train` (score.rank), which a cell of each prompt sets; .jsonl with an object a line: prompt, negative_prompt, tags
(a list), overrides (an object). What a prompt sets itself wins over --set.

Values of --set are separated by commas. A list is one value in brackets, 'camera.distance=[2.6,3.2],[1.0,1.5]';
a text that holds commas stands in double quotes, 'negative_prompt="ugly, blurry",""'."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepPlanArguments:
    """What `sweep plan` takes."""

    prompts: tyro.conf.Positional[str]
    """A file of prompts: .txt, .csv or .jsonl."""
    sweep_dir: str = ""
    """The sweep's directory, new or planned before; empty: sweeps/<name of the prompt file>."""
    seeds: str = "0"
    """Seeds, separated by commas: a run for each."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """name=value,value: an option of `train` and its values, a run for each; may be given several times."""
    set_together: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """name=value,value name=value,value: options that change together, the first values in one run, the second ones in another."""
    preset: str | None = None
    """What every run starts from; `dist-vsd info` lists the presets; embedded by default."""
    num_processes: int | None = None
    """Ranks of one run, on one node; 1 by default."""
    launch_config: str | None = None
    """accelerate's YAML for runs of several ranks (launch_configs/); plain data parallel by default."""


def run_plan(arguments: list[str]) -> int:
    """Run the command; see cli.main for the exit codes."""
    parsed = parse(SweepPlanArguments, arguments, "sweep plan", DESCRIPTION)

    from dist_vsd.config_files import read_yaml
    from dist_vsd.sweep.overrides import read_variations
    from dist_vsd.sweep.plan import add_runs, distinct, expand, settle
    from dist_vsd.sweep.prompts import read_prompts
    from dist_vsd.sweep.slurm import copy_script

    if parsed.num_processes is not None and parsed.num_processes < 1:
        raise ValueError(f"--num-processes must be at least 1, got {parsed.num_processes}: raise --num-processes")
    seeds, launch_config = read_seeds(parsed.seeds), parsed.launch_config
    if launch_config:
        read_yaml(Path(launch_config))
        launch_config = str(Path(launch_config).absolute())  # runs may be started from elsewhere
    variations = read_variations(list(parsed.set), [list(words) for words in parsed.set_together])
    prompts, repeated = distinct(read_prompts(Path(parsed.prompts)))
    path = Path(parsed.sweep_dir or Path("sweeps") / Path(parsed.prompts).stem)
    settings = settle(path, {"preset": parsed.preset, "num_processes": parsed.num_processes, "launch_config": launch_config})
    require_writable_folder(path, f"--sweep-dir {path}")
    sweep, new = add_runs(path, settings, expand(prompts, variations, seeds, settings))
    copy_script(path)
    if repeated:
        print(_of_repeated(repeated))
    print(f"{len(prompts)} prompt(s) x {len(variations)} setting(s) x {len(seeds)} seed(s): {len(new)} new run(s) of {len(sweep.runs)}")
    print(f"planned in {path}; start with\n  dist-vsd sweep submit {path}")
    return 0


def read_seeds(text: str) -> list[int]:
    """Read seeds separated by commas; ValueError for anything else, or one below 0."""
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--seeds must be whole numbers with commas between, as in 0,1, got {text[:60]!r}: change --seeds") from error
    if min(seeds) < 0:
        raise ValueError(f"--seeds must be 0 or more, got {min(seeds)}: change --seeds")
    return list(dict.fromkeys(seeds))


def _of_repeated(repeated: list[Prompt]) -> str:
    more = f" and {len(repeated) - 1} more" if len(repeated) > 1 else ""
    return f"{repeated[0].source}{more}: repeat an earlier prompt, which is planned once"
