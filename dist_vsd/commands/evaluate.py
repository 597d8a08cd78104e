"""`dist-vsd evaluate`: how good the particles of runs are, and how they differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from dist_vsd.commands.arguments import nearest_command, parse
from dist_vsd.commands.help import Pages
from dist_vsd.evaluation.metric_names import EVALUATION_FILE, METRICS, ONLY_WHEN_ASKED
from dist_vsd.runs.run_directory import split_stage
from dist_vsd.writable import require_writable_file

if TYPE_CHECKING:
    import torch

    from dist_vsd.evaluation.instruments import Instruments
    from dist_vsd.runs.saved_run import SavedRun

FIGURES_A_TABLE = 6
LESS = "give fewer runs at once, or lower --num-azimuths, --sphere-subdivisions or --num-samples"
DESCRIPTION = """Evaluate runs, finished or stopped, by their newest valid checkpoints.

- clip: cosine of views and prompt
- r_precision: share of views to which the prompt is the nearest of --prompts, or of the embedded prior's captions, or of the runs' prompts
- entropy: of CLIP's predictions over that set: for a view (quality, low is sharp) and of their mean (variety)
- diversity: 1 - the mean cosine between two particles from the same camera, by CLIP
- multi_face: share of particles whose front is seen from more than one side
- recognition: object, colour and view that CLIP recognises; how evenly they are spread where the prompt leaves them open (embedded prior)
- overlap: intersection over union with the known scene (embedded prior)
- chamfer: distance of a mesh to the surface of the known scene, and how far their normals agree (embedded prior)
- t3bench: quality from all around: the best CLIP score, smoothed over neighbouring viewpoints
- dino, lpips: diversity by other features, whose weights are given
- samples: colours and views against those of the prior's own samples (embedded prior; takes a while)
- fid: Frechet distance of views and the prior's own samples (takes a while)

Without --metrics: all that the run and the given weights allow, but for samples and fid. Writes RUN_DIR/evaluation.json, of RUN_DIR@STAGE
evaluation_STAGE.json."""

PAGES = Pages(
    examples="""Measure runs: CLIP score, R-precision, quality and variety, diversity, faces, recognition, overlap.

  dist-vsd evaluate runs/* --out table.csv
  dist-vsd evaluate runs/a-green-duck --metrics clip r_precision""",
    everyday=("--metrics", "--prompts", "--clip", "--num-azimuths", "--elevations", "--out"),
    topics={
        "What is measured": ("--metrics", "--prompts", "--out"),
        "By which networks": ("--clip", "--dino", "--lpips"),
        "From where": ("--elevations", "--num-azimuths", "--sphere-subdivisions"),
        "Against the prior's own samples": ("--num-samples", "--sample-guidance"),
    },
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """What `evaluate` takes."""

    run_dirs: tyro.conf.Positional[tuple[str, ...]]
    """Run directories, or RUN_DIR@STAGE: as that stage has left its particles."""
    prompts: str = ""
    """A text file, a prompt a line: the set that R-precision is told from."""
    metrics: tuple[str, ...] = ()
    """Out of clip, r_precision, entropy, diversity, multi_face, recognition, overlap, chamfer, t3bench, dino, lpips, samples and fid."""
    clip: str = ""
    """The folder of a transformers CLIPModel in safetensors, or a hub id; empty: the run's own --clip, else the one beside the prior."""
    dino: str = ""
    """Folder of a transformers DINO, DINOv2 or DINOv3 in safetensors."""
    lpips: str = ""
    """LPIPS's weights (AlexNet) as a safetensors file; dist_vsd/evaluation/lpips.py says how to save it."""
    elevations: tuple[float, ...] = (15.0,)
    """Of the turns from which 3D particles are looked at, degrees."""
    num_azimuths: int = 24
    """Views of each turn."""
    sphere_subdivisions: int = 1
    """Of t3bench's icosphere: 1 has 42 viewpoints, 2 (the benchmark's own) 162, at five focal lengths each."""
    num_samples: int = 64
    """Samples of the prior for each prompt, for samples and fid."""
    sample_guidance: float = 7.5
    """Their guidance scale, the same for all runs."""
    out: str = ""
    """File for the results of all runs: .csv or .json."""

    def __post_init__(self) -> None:
        if not self.run_dirs:
            raise ValueError("no run directory is given: give the directories that `dist-vsd train` made")
        for name in self.metrics:
            if name not in METRICS:
                raise ValueError(f"--metrics must be out of {', '.join(METRICS)}, got {name!r}{nearest_command(name, METRICS)}")
        if not self.elevations or not all(-90 <= elevation <= 90 for elevation in self.elevations):
            raise ValueError(f"--elevations must be one or more numbers in [-90, 90], got {self.elevations}")
        if self.num_azimuths < 1:
            raise ValueError(f"--num-azimuths must be at least 1, got {self.num_azimuths}")
        if not 0 <= self.sphere_subdivisions <= 3:
            raise ValueError(f"--sphere-subdivisions must be 0 to 3, got {self.sphere_subdivisions}")
        if self.num_samples < 2:
            raise ValueError(f"--num-samples must be at least 2, got {self.num_samples}")
        if not 0.0 <= self.sample_guidance < math.inf:
            raise ValueError(f"--sample-guidance must be a number from 0 on, got {self.sample_guidance}: change it")
        if self.out and Path(self.out).suffix not in (".csv", ".json"):
            raise ValueError(f"--out must end in .csv or .json, got {self.out!r}")

    @property
    def wanted(self) -> tuple[str, ...]:
        """The metrics to try."""
        return tuple(dict.fromkeys(self.metrics)) or tuple(name for name in METRICS if name not in ONLY_WHEN_ASKED)


def run(arguments: list[str]) -> int:
    """Run the command; see cli.main for the exit codes."""
    parsed = parse(EvaluateArguments, arguments, "evaluate", DESCRIPTION, pages=PAGES)
    folders = [Path(name) for name in dict.fromkeys(parsed.run_dirs)]
    for folder in folders:
        file = split_stage(folder)[0] / EVALUATION_FILE
        require_writable_file(file, f"{str(file)!r}", "give it back to its owner, or copy the run")
    if parsed.out:
        require_writable_file(Path(parsed.out), f"--out {parsed.out!r}")
    prompts = read_prompts(Path(parsed.prompts)) if parsed.prompts else ()

    from dist_vsd.device import best_device
    from dist_vsd.scaling.memory import Memory, telling_out_of_memory

    device = best_device()
    with telling_out_of_memory(Memory.of(device), lambda _memory: LESS):
        evaluate(parsed, folders, prompts, device)
    return 0


def evaluate(parsed: EvaluateArguments, folders: list[Path], prompts: tuple[str, ...], device: torch.device) -> None:
    """Measure runs, write their figures, and show them; ValueError for what some run lacks."""
    from dist_vsd.evaluation.evaluation import evaluate_run
    from dist_vsd.evaluation.instruments import NO_CLIP
    from dist_vsd.evaluation.results_file import record_of, write_all, write_record
    from dist_vsd.runs.saved_run import open_run

    checked = [open_run(folder, (0,)) for folder in folders]  # the particles themselves are read one run at a time
    instruments = list(choose_instruments(parsed, checked, prompts, device))
    require_metrics(parsed.metrics, list(zip(checked, instruments, strict=True)))
    for note in (note for saved in checked for note in saved.notes):
        print(note)
    if blind := [str(saved.path) for saved, chosen in zip(checked, instruments, strict=True) if chosen.scorer is None]:
        print(f"no figures by CLIP of {', '.join(blind[:3])}{' and others' if len(blind) > 3 else ''}: {NO_CLIP}")
    settings = {key: value for key, value in dataclasses.asdict(parsed).items() if key not in ("run_dirs", "out")}
    records = []
    for number, (folder, chosen) in enumerate(zip(folders, instruments, strict=True), 1):
        saved = open_run(folder, device=device)
        records.append(record_of(folder, saved, evaluate_run(saved, chosen), settings))
        print(f"{number}/{len(folders)}  {write_record(records[-1], folder)}", flush=True)
    if parsed.out:
        Path(parsed.out).parent.mkdir(parents=True, exist_ok=True)
        write_all(records, Path(parsed.out))
        print(parsed.out)
    show(records)


def read_prompts(file: Path) -> tuple[str, ...]:
    """Return the prompts of a text file, one a line.

    Raises:
        ValueError: it can't be read, or holds fewer than two.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {file} can't be read ({type(error).__name__}): check the path") from error
    prompts = tuple(dict.fromkeys(line for line in lines if line))
    if len(prompts) < 2:
        raise ValueError(f"--prompts {file} must hold at least two prompts, one a line, got {len(prompts)}: add others")
    return prompts


def choose_instruments(
    parsed: EvaluateArguments, runs: list[SavedRun], prompts: tuple[str, ...], device: torch.device
) -> Iterable[Instruments]:
    """Yield the instruments for each run; those of the same prior share their networks.

    Raises:
        ValueError: a folder or file of weights can't be used, or a text is too long for the CLIP or not in its vocabulary.
    """
    from dist_vsd.evaluation.dino import DinoEncoder
    from dist_vsd.evaluation.instruments import Instruments
    from dist_vsd.evaluation.lpips import Lpips
    from dist_vsd.evaluation.prior_samples import PriorSamples
    from dist_vsd.evaluation.question import ask
    from dist_vsd.priors.clip import ClipScorer
    from dist_vsd.priors.clip_folder import clip_for
    from dist_vsd.priors.pipeline_folder import EMBEDDED_FOLDERS

    dino = DinoEncoder.load(Path(parsed.dino), device) if parsed.dino else None
    lpips = Lpips.load(Path(parsed.lpips), device) if parsed.lpips else None
    samples = PriorSamples(parsed.num_samples, parsed.sample_guidance, device=device) if set(ONLY_WHEN_ASKED) & set(parsed.wanted) else None
    scorers: dict[Path | None, ClipScorer | None] = {None: None}
    for saved in runs:
        config = saved.config
        named = parsed.clip or config.evaluate_clip
        folder = clip_for(config.prior, named)
        if folder not in scorers:
            scorers[folder] = ClipScorer.load(folder, device)
        is_embedded = config.prior in EMBEDDED_FOLDERS
        # Without a file, other priors' prompts are told from one another; the embedded language is its own set.
        others = prompts or (() if is_embedded else tuple(dict.fromkeys(other.config.prompt for other in runs)))
        scorer = scorers[folder]
        if scorer is not None:
            question = ask(config.prompt, others, is_embedded)
            require_readable(scorer, [*question.candidates, *question.view_texts], is_embedded and not named)
        yield Instruments(
            metrics=parsed.wanted, scorer=scorer, in_embedded_language=is_embedded, prompts=others, dino=dino, lpips=lpips,
            samples=samples, elevations_deg=parsed.elevations, num_azimuths=parsed.num_azimuths,
            sphere_subdivisions=parsed.sphere_subdivisions,
        )  # fmt: skip


def require_readable(scorer: Any, texts: list[str], has_closed_vocabulary: bool) -> None:
    """Refuse texts that a CLIP would cut off, or whose words it does not know.

    Raises:
        ValueError: naming the first such text.
    """
    from dist_vsd.priors.pipeline_folder import EMBEDDED_NAME, check_vocabulary, find_pipeline

    longest = scorer.model.config.text_config.max_position_embeddings
    for text in texts:
        count = len(scorer.tokenizer(text).input_ids)
        if count > longest:
            raise ValueError(f"a text of {count} tokens is too long for the CLIP, which reads {longest}: {text[:80]!r}; shorten the prompt")
    if has_closed_vocabulary:
        check_vocabulary(texts, find_pipeline(EMBEDDED_NAME))


def require_metrics(asked: tuple[str, ...], runs: list[tuple[SavedRun, Instruments]]) -> None:
    """Refuse metrics that were asked for by name and lack what they need on some run, or have no meaning for any.

    Raises:
        ValueError: naming the metric, what it needs, and the run.
    """
    for metric in asked:
        for saved, instruments in runs:
            if need := instruments.missing(metric):
                raise ValueError(f"metric {metric} of {saved.path} needs {need}")
        unfit = [instruments.unfit(metric, saved) for saved, instruments in runs]
        if all(unfit):
            raise ValueError(f"metric {metric} needs {unfit[0]}, which {runs[0][0].path} has not: leave it out")


def show(records: list[dict[str, Any]]) -> None:
    """Print a table: a row for each figure where there is one run, else a row for each run, and their means."""
    from rich.console import Console
    from rich.table import Column, Table

    from dist_vsd.evaluation.results_file import means_of, names_of

    names, console = names_of(records), Console()
    if len(records) == 1:
        table = Table("figure", records[0]["prompt"])
        for name in names:
            table.add_row(name, f"{records[0]['figures'][name]:.3f}")
        console.print(table)
        return
    for first in range(0, len(names), FIGURES_A_TABLE):  # so that a table is not wider than a terminal
        shown = names[first : first + FIGURES_A_TABLE]
        table = Table(Column("run", overflow="fold"), *(name.replace("/", "/\n") for name in shown))
        for record in records:
            table.add_row(record["run_dir"], *(f"{record['figures'][n]:.3f}" if n in record["figures"] else "-" for n in shown))
        table.add_section()
        means = means_of(records)
        table.add_row("mean", *(f"{means[n]:.3f}" for n in shown))
        console.print(table)

