"""`dist-vsd evaluate`: how good the particles of runs are, and how they differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vsd.commands.arguments import parse
from dist_vsd.commands.evaluate_protocol import run_protocol
from dist_vsd.commands.evaluate_words import DESCRIPTION, PAGES, EvaluateArguments, run_dirs_of
from dist_vsd.evaluation.metric_names import EVALUATION_FILE, ONLY_WHEN_ASKED
from dist_vsd.runs.run_directory import split_stage
from dist_vsd.writable import require_writable_file

if TYPE_CHECKING:
    import torch

    from dist_vsd.evaluation.instruments import Instruments
    from dist_vsd.runs.saved_run import SavedRun

FIGURES_A_TABLE = 6
LESS = "give fewer runs at once, or lower --num-azimuths, --sphere-subdivisions or --num-samples"


def run(arguments: list[str]) -> int:
    """Run the command; see cli.main for the exit codes."""
    parsed = parse(EvaluateArguments, arguments, "evaluate", DESCRIPTION, pages=PAGES)
    folders, notes = run_dirs_of(parsed.run_dirs)
    if parsed.protocol:
        run_protocol(parsed.protocol, parsed.method, parsed.size, Path(parsed.prompts), Path(parsed.out or parsed.protocol), folders, notes)
        return 0
    for folder in folders:
        file = split_stage(folder)[0] / EVALUATION_FILE
        require_writable_file(file, f"{str(file)!r}", "give it back to its owner, or copy the run")
    if parsed.out:
        require_writable_file(Path(parsed.out), f"--out {parsed.out!r}")
    prompts = read_prompts(Path(parsed.prompts)) if parsed.prompts else ()

    from dist_vsd.device import best_device
    from dist_vsd.scaling.memory import Memory, telling_out_of_memory

    device = best_device()
    for note in notes:
        print(note)
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

