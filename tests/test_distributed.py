"""Real ranks: gloo processes. What the launcher itself does with lines such as these is shown by test_launch_lines.py."""

import torch

from dist_vsd.cli import main
from dist_vsd.distributed.collectives import fingerprint
from tests.ranks import run_ranks
from tests.runs import TINY, checkpoint, train


def assert_close(one, other):
    """Same trajectory up to the order of phi's sums: updates of Adam at 1e-2 amplify fp32 rounding to about 1e-5."""
    assert one.keys() == other.keys()
    for name in one:
        if one[name].is_floating_point():
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_two_ranks_make_the_same_particles_as_one(tmp_path):
    arguments = ["a green duck", "--num-particles", "2", *TINY, "--num-updates", "4", "--micro-batch-size", "1"]
    code, output = run_ranks([*arguments, "--turntables", "--run-dir", str(tmp_path / "two")], num_ranks=2)
    assert code == 0, output
    assert "turntables and meshes of 2 particle(s)" in output
    assert main(["train", *arguments, "--run-dir", str(tmp_path / "one")]) == 0
    # Adam's second moments start at zero with eps 1e-15: a rounding error may flip the sign of a step that should be zero.
    # After few updates little was amplified yet.
    one, two = checkpoint(tmp_path / "one", 4), checkpoint(tmp_path / "two", 4)
    phi = [name for name in one if name.startswith("phi.safetensors")]
    assert_close({n: one[n] for n in phi}, {n: two[n] for n in phi})
    for suffix in ("gif", "mp4", "png"):
        assert len(list((tmp_path / "two" / "export").glob(f"*.{suffix}"))) == 2


def test_one_particle_on_two_ranks_is_one_particle_seen_twice(tmp_path):
    code, output = run_ranks(["a green duck", "--num-particles", "1", *TINY, "--run-dir", str(tmp_path / "run")], num_ranks=2)
    assert code == 0, output
    assert len({name.split(":")[0] for name in checkpoint(tmp_path / "run", 8) if name.startswith("particles/")}) == 1


def test_bad_input_ends_all_ranks_with_one_line(tmp_path):
    code, output = run_ranks(["a green dragon", *TINY, "--run-dir", str(tmp_path / "run")], num_ranks=2)
    assert code == 2
    assert output.count("dist-vsd: error:") == 1
    assert "dragon" in output
    assert not (tmp_path / "run").exists()


def test_fingerprint_sees_a_single_bit():
    tensor = torch.arange(8.0)
    flipped = tensor.clone()
    flipped.view(torch.int32)[3] ^= 1
    assert fingerprint([tensor]) == fingerprint([tensor.clone()])
    assert fingerprint([tensor]) != fingerprint([flipped])


def test_what_aborts_in_pythons_teardown_does_not_fail_a_run_that_is_done(tmp_path):
    """Processes of their own from their start to their teardown."""
    arguments = ["a green duck", *TINY, "--num-updates", "1", "--run-dir", str(tmp_path / "run")]
    code, output = train(arguments, num_ranks=2, fault=("teardown_aborts", "1"), cold=True)
    assert code == 0, output
    assert "done in" in output
