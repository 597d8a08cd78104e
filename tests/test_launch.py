"""Wrong launches end in one line on all ranks; and what a launcher's precision and DeepSpeed settings do."""

import datetime

import pytest
import torch

from dist_vsd.cli import main
from dist_vsd.commands.train_words import parse_words
from dist_vsd.distributed.launch_checks import check_launch, check_zero, resolve_precision
from dist_vsd.distributed.store import refuse_together
from dist_vsd.errors import RunFailed
from tests.ranks import Ranks, launch_words, run_ranks
from tests.runs import TINY, train

SHORT = [*TINY, "--num-updates", "2", "--checkpoint-every", "2"]


@pytest.mark.parametrize(
    ("variables", "flags", "told"),
    [
        ({"WORLD_SIZE": "2"}, [], "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, [], "must be one of no, bf16, fp16, got 'fp8'"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ["--precision", "fp32"], "is fp32 but the launcher's mixed_precision is bf16"),
        ({"ACCELERATE_USE_FSDP": "true"}, [], "asks for FSDP"),
    ],
)
def test_a_wrong_launch_is_refused_in_one_line(variables, flags, told, tmp_path, monkeypatch, capsys):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "a green duck", *SHORT, *flags, "--run-dir", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("dist-vsd: error:")
    assert told in lines[0]
    assert not (tmp_path / "run").exists()


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_launch()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="got 3 ranks on a node of 2: use --num_processes 2"):
        check_launch()


@pytest.mark.parametrize(
    ("flag", "launcher", "on_cpu", "resolved"),
    [("", "no", True, "fp32"), ("bf16", "no", True, "bf16"), ("", "bf16", True, "bf16"), ("fp16", "fp16", False, "fp16")],
)
def test_the_precision_is_the_flags_or_else_the_launchers(flag, launcher, on_cpu, resolved, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    assert resolve_precision(flag, on_cpu) == resolved


def test_a_presets_precision_gives_way_to_the_launchers_and_a_files_or_flags_does_not(monkeypatch, tmp_path):
    (tmp_path / "file.yaml").write_text("precision: bf16\n")
    words = ["a pineapple", "--preset", "stable-diffusion", "--prior", "somewhere"]
    own = (["--config", str(tmp_path / "file.yaml")], ["--precision", "bf16"])
    assert parse_words(words).run.precision == "bf16"  # the preset's
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert parse_words(words).run.precision == "fp16"
    for asked in own:
        precision = parse_words([*words, *asked]).run.precision
        with pytest.raises(ValueError, match="precision is bf16 but the launcher's mixed_precision is fp16"):
            resolve_precision(precision, on_cpu=False)


def test_deepspeed_settings_that_change_the_update_are_refused():
    check_zero(2, {"gradient_accumulation_steps": 1, "gradient_clipping": "auto"})
    for stage, settings in [(0, {}), (2, {"gradient_accumulation_steps": 4}), (2, {"gradient_clipping": 1.0})]:
        with pytest.raises(ValueError, match="must be"):
            check_zero(stage, settings)


def test_a_rank_that_never_comes_is_named(monkeypatch):
    store = torch.distributed.HashStore()
    store.set_timeout(datetime.timedelta(seconds=1))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    store.set("launch/2", "")
    with pytest.raises(RunFailed, match=r"ranks 1, 3 did not come within 1 s"):
        refuse_together(store, "launch", "")


def test_deepspeed_is_on_and_its_own_precision_and_clipping_are_off():
    pytest.importorskip("deepspeed")
    launch = ["--mixed_precision", "bf16", *launch_words("deepspeed_zero3", 2)]
    code, output = run_ranks(["a green duck"], 2, launch, fault=("tells_how_it_started", "all"))
    assert code == 0, output
    assert output.splitlines()[-1] == "3 bf16 DEEPSPEED 0.0 {'enabled': False}"


def test_deepspeed_compiles_nothing_and_so_waits_for_nobodys_lock(tmp_path, monkeypatch):
    """A process that is killed while it builds or loads an extension leaves a lock, on which every later start would hang."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    code, output = run_ranks(["a green duck"], 2, "deepspeed_zero1", fault=("tells_how_it_started", "all"), seconds=60)
    assert code == 0, output
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == ["deepspeed_shm_comm", "deepspeed_shm_comm/lock"]


@pytest.mark.parametrize(
    ("other_flags", "fault", "told"),
    [
        (["--score.rank", "3"], (), ["configuration score.rank must be the same on all ranks, got 4 on rank 0, 3 on rank 1"]),
        (["--num-updates", "0"], (), ["num_updates must be at least 1, got 0: raise --num-updates (on rank 1)"]),
        ([], ("torch_is_older", "1"), ["version of torch must be the same on all ranks", "'2.6.1' on rank 1: install the same packages"]),
        ([], ("deepspeed_is_missing", "1"), ["DeepSpeed, which is not installed: pip install dist_vsd[deepspeed]", "(on rank 1)"]),
    ],
    ids=["configuration", "bad input", "version", "deepspeed"],
)
def test_ranks_that_differ_all_end_with_2_and_one_line(other_flags, fault, told, tmp_path):
    flags = ["a green duck", *SHORT, "--num-particles", "2", "--score.rank", "4", "--run-dir", str(tmp_path / "run")]
    ranks = Ranks(flags, 2, fault=fault, own={1: other_flags})
    for process in ranks.processes:
        process.join(300)
    outputs = [ranks.output(rank) for rank in range(2)]
    assert ranks.finish()[0] == [2, 2], outputs
    assert [output.count("dist-vsd: error:") for output in outputs] == [1, 0]
    assert all(text in outputs[0] for text in told), outputs[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is right there")
def test_fp16_on_cpu_ranks_ends_the_launch_with_one_line(tmp_path):
    code, output = train(["a green duck", *SHORT, "--run-dir", str(tmp_path / "run")], num_ranks=2, config="fp16")
    assert code != 0
    assert output.count("dist-vsd: error:") == 1
    assert "precision fp16 needs a GPU: use fp32 or bf16" in output
    assert "exitcode  : 2" in output
    assert not (tmp_path / "run").exists()
