"""The cost model and `dist-vsd plan`: numbers computed by hand, limits, and files that are not what they should be."""

import dataclasses
import itertools
import json
import math
import re

import numpy
import pytest
from safetensors.numpy import save_file

from dist_vsd.commands import plan, train
from dist_vsd.config import RunConfig
from dist_vsd.config_files import merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.runs.run_directory import RunDirectory
from dist_vsd.scaling import cost_model
from dist_vsd.scaling.cost_model import Cluster, Link, Sizes, Span, StageSeconds, update_cost
from dist_vsd.scaling.counted_memory import count_peak
from dist_vsd.scaling.stage_times import counted, line_through, read_measured

STAGES = StageSeconds(render=0.1, scores=0.2, backward=0.3, phi=0.4)
SIZES = Sizes(theta_numbers=1000, phi_numbers=500, prior_bytes=1e6, render_bytes=1e5)
FREE = Link(math.inf, 0.0)


def cost_of(num_particles, num_nodes=1, gpus=1, inside=FREE, between=FREE, num_views=0, **options):
    cluster = Cluster(num_nodes, gpus, inside, between)
    return update_cost(Layout.of(num_particles, cluster.num_ranks, num_views=num_views), cluster, STAGES, SIZES, **options)


def planned(*arguments, capsys):
    assert plan.run([*arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def bench_row(**changes):
    stages = {"render": 0.2, "scores": 0.4, "backward": 0.6, "phi": 0.8}
    sizes = {"theta_numbers": 1000, "phi_numbers": 500, "prior_bytes": 2**20, "peak_memory_mib": 5.0}
    return {"mode": "weak", "num_ranks": 1, "num_particles": 2, "seconds_per_update": 2.2, "stages": stages} | sizes | changes


def bench_file(folder, *rows):
    file = folder / "bench.json"
    file.write_text(json.dumps({"commit": "abc", "machine": "two cores", "rows": list(rows)}))
    return str(file)


def run_directory(folder, num_particles=3, world_size=2, lines=(), config="", phi=True):
    checkpoint = folder / "checkpoints" / "update_00000008"
    (checkpoint / "particles").mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(json.dumps({"version": 1, "world_size": world_size}))
    moments = {f"optimizer/{n}/{m}": numpy.zeros((10, 7), "f4") for n in ("grid", "mlp") for m in ("exp_avg", "exp_avg_sq")}
    save_file(moments | {"theta/occupancy": numpy.zeros(99, "f4")}, checkpoint / "particles" / "0000.safetensors")
    if phi:
        save_file({"a": numpy.zeros((4, 5), "f4"), "b": numpy.zeros(3, "f4")}, checkpoint / "phi.safetensors")
    (folder / "config.yaml").write_text(config or f"num_particles: {num_particles}\nscore:\n  steps_per_update: 2\n")
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def seconds_line(scale=1.0):
    seconds = {"render": 3, "scores": 6, "backward": 9, "phi": 12, "update": 33}
    return json.dumps({"update": 1, **{f"seconds/{name}": scale * value for name, value in seconds.items()}})


# Formulas


def test_a_ring_of_four_by_hand():
    # 2 * 3/4 of 1 GB at 0.5 GB/s is 3 s; 6 messages of 1 ms.
    assert cost_model.ring_all_reduce_seconds(1e9, 4, Link(0.5e9, 1e-3)) == pytest.approx(3.006)
    assert Link.of(8.0, 5e6) == Link(1e9, 5.0)


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_a_ring_played_step_by_step_sends_and_waits_as_the_formula_says(num_ranks):
    chunks = [{rank: {rank} for rank in range(num_ranks)} for _ in range(num_ranks)]  # chunk -> rank -> whose share it has
    sent = steps = 0
    for phase, step in itertools.product((0, 1), range(num_ranks - 1)):
        moves = [((rank - step + phase) % num_ranks, rank, (rank + 1) % num_ranks) for rank in range(num_ranks)]
        values = [set(chunks[chunk][source]) for chunk, source, _ in moves]
        for (chunk, _, target), value in zip(moves, values, strict=True):
            chunks[chunk][target] = value | (chunks[chunk][target] if phase == 0 else set())
        sent, steps = sent + 1 / num_ranks, steps + 1
    assert all(share == set(range(num_ranks)) for chunk in chunks for share in chunk.values())  # everyone has all of it
    assert cost_model.ring_sent_bytes(1.0, num_ranks) == pytest.approx(sent)
    assert cost_model.ring_all_reduce_seconds(0.0, num_ranks, Link(1.0, 1.0)) == steps


def test_two_nodes_of_four_by_hand():
    cluster = Cluster(2, 4, Link(1e9, 1e-5), Link(1e8, 1e-4))
    # inside: 1.5 * 1e8 / 1e9 + 6e-5; between: the node's link carries 2 * 1/2 of all the bytes, 1e8 / 1e8 + 2e-4
    assert cost_model.all_reduce_seconds(1e8, Span(4, 2, 1), cluster) == pytest.approx(0.15006 + 1.0002)
    assert cost_model.all_reduce_seconds(1e8, Span(4, 1, 1), cluster) == pytest.approx(0.15006)


@pytest.mark.parametrize(
    ("group_size", "gpus", "span"),
    [
        (1, 8, Span(1, 1, 1)), (4, 8, Span(4, 1, 1)), (8, 8, Span(8, 1, 1)), (16, 8, Span(8, 2, 1)),
        (512, 8, Span(8, 64, 1)), (12, 8, Span(8, 2, 2)), (3, 8, Span(3, 2, 2)), (2, 1, Span(1, 2, 1)),
    ],
)  # fmt: skip
def test_groups_of_neighbours_lie_over_nodes(group_size, gpus, span):
    assert cost_model.span_of_neighbours(group_size, gpus) == span


def test_the_fullest_rank_is_the_layouts():
    for num_particles, world_size, num_views in itertools.product(range(1, 9), range(1, 9), (0, 1, 2, 6)):
        try:
            layout = Layout.of(num_particles, world_size, num_views=num_views)
        except ValueError:
            continue
        owned = [len(layout.particles_of_shard(shard)) for shard in range(layout.num_shards)]
        views = layout.num_views // layout.view_ranks
        assert cost_model.most_renders(layout) == max(owned) * views
        assert cost_model.average_renders(layout) == pytest.approx(sum(owned) * views / layout.num_shards)


def test_one_rank_has_no_communication():
    cost = cost_of(3, inside=Link(1.0, 1.0), between=Link(1.0, 1.0))
    assert (cost.communication, cost.rank_sent_bytes, cost.node_sent_bytes, cost.imbalance) == (0.0, 0.0, 0.0, 0.0)
    assert cost.seconds == pytest.approx(3.0)  # three renders of 0.1 + 0.2 + 0.3 + 0.4
    assert cost.efficiency == 1.0


@pytest.mark.parametrize("num_nodes", [1, 8, 64, 1000])
def test_free_links_make_weak_scaling_perfect(num_nodes):
    assert cost_of(4 * 8 * num_nodes, num_nodes, 8).efficiency == 1.0


def test_a_particle_more_than_ranks_costs_a_whole_round():
    cost = cost_of(5, 1, 4)  # 2, 1, 1, 1: the average rank has 1.25 renders
    assert cost.compute == pytest.approx(1.25)
    assert cost.imbalance == pytest.approx(0.75)
    assert cost.efficiency == pytest.approx(1.25 / 2)


def test_two_particles_on_four_ranks_share_their_views_and_reduce_theta():
    cost = cost_of(2, 1, 4, inside=Link(1000.0, 0.0))
    assert (cost.layout.num_shards, cost.layout.view_ranks) == (2, 2)
    assert cost.compute == pytest.approx(1.0)  # one view a rank
    assert cost.theta_reduction == pytest.approx(2 * 1 / 2 * 4000 / 1000)
    assert cost.phi_reduction == pytest.approx(2 * 3 / 4 * 2000 / 1000)
    assert cost.rank_sent_bytes == 4000 + 3000
    assert cost_of(2, 1, 4, num_views=8).compute == pytest.approx(4.0)


def test_groups_that_cross_nodes_share_their_links():
    cost = cost_of(2, 3, 8, between=Link(1000.0, 0.0))  # 12 ranks a particle: both use the second node's link
    assert cost.theta_reduction == pytest.approx(2 * (2 * 1 / 2 * 4000 / 1000))
    assert cost.node_sent_bytes == pytest.approx(2 * 4000 + 2 * 2 / 3 * 2000)


def test_overlap_hides_phis_reduction_up_to_its_compute():
    slow, fast = Link(1e3, 0.0), Link(1e5, 0.0)  # 2000 bytes over two ranks: 2 s and 0.02 s, phi's compute is 0.4 s
    assert cost_of(2, 2, overlap=0.0, between=fast).phi_reduction == pytest.approx(0.02)
    assert cost_of(2, 2, overlap=0.5, between=fast).phi_reduction == pytest.approx(0.01)
    assert cost_of(2, 2, overlap=1.0, between=fast).phi_reduction == 0.0
    assert cost_of(2, 2, overlap=1.0, between=slow).phi_reduction == pytest.approx(1.6)
    assert cost_of(2, 2, overlap=1.0, between=slow, num_phi_steps=3).phi_reduction == pytest.approx(3 * 1.6)


def test_phi_steps_multiply_phis_compute_and_reduction_alone():
    one, five = (cost_of(4, 2, 2, between=Link(1e4, 0.0), num_phi_steps=steps) for steps in (1, 5))
    assert five.phi == pytest.approx(5 * one.phi)
    assert five.phi_reduction == pytest.approx(5 * one.phi_reduction)
    assert (five.render, five.scores, five.backward, five.agreement) == (one.render, one.scores, one.backward, one.agreement)


def test_memory_by_hand():
    layout = Layout.of(5, 2)
    memory = {"prior": 1e6, "theta": 3 * 16 * 1000, "phi": 16 * 500, "activations": 2e5}
    assert cost_model.rank_memory_bytes(layout, SIZES, 2) == memory
    assert cost_model.rank_memory_bytes(layout, SIZES, 1, offload=True) == memory | {"theta": 2 * 16 * 1000, "activations": 1e5}
    unknown = Sizes(1000, 500, None, None)
    assert cost_model.rank_memory_bytes(layout, unknown, 8)["activations"] is None


def test_the_counted_work_of_an_update_is_the_published_one():
    stages = counted(gpu_tflops=1.0, render_ms=0.0).stages
    assert cost_model.render_seconds(stages, 1) == pytest.approx(6.395)  # 6,395 GFLOP
    with_field = counted(gpu_tflops=1.0, render_ms=100.0).stages
    assert cost_model.render_seconds(with_field, 1) == pytest.approx(6.395 + 0.3)


def test_the_counted_field_is_the_presets():
    import torch

    from dist_vsd.config_files import load_preset
    from dist_vsd.particles.radiance_field import RadianceField

    field = RadianceField(load_preset("stable-diffusion").field, torch.Generator())
    assert counted(1.0, 1.0).sizes.theta_numbers == sum(p.numel() for p in field.parameters())


# The command


def test_64_nodes_by_hand(capsys):
    (scale,) = planned("--nodes", "64", "--num-particles", "2048", "--gpu-tflops", "100", "--render-ms", "50", capsys=capsys)["scales"]
    assert (scale["num_shards"], scale["view_ranks"], scale["most_particles_of_a_rank"]) == (512, 1, 4)
    inside = 2 * 7 / 8 * 4 * 2_491_392 / 450e9 + 14 * 3e-6
    between = 2 * 63 / 64 * 4 * 2_491_392 / 50e9 + 126 * 5e-6
    assert scale["seconds"]["phi_reduction"] == pytest.approx(inside + between)
    compute, agreement = 4 * (0.06395 + 0.15), 2 * (14 * 3e-6 + 126 * 5e-6)  # two messages of 8 bytes
    assert scale["efficiency"] == pytest.approx(compute / (compute + inside + between + agreement), rel=1e-6)
    assert scale["node_hours"] == pytest.approx(64 * scale["seconds"]["update"] * 25_000 / 3600)
    assert scale["memory_bytes"]["theta"] == 4 * 16 * 12_200_337
    parts = ("render", "scores", "backward", "phi", "other", "imbalance", "theta_reduction", "phi_reduction", "agreement")
    assert sum(scale["seconds"][part] for part in parts) == pytest.approx(scale["seconds"]["update"])


def test_several_scales_are_a_row_each_and_the_json_file_says_the_same(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert plan.run(["--nodes", "1", "8", "64", "128", "--particles-per-rank", "4", "--json", str(file)]) == 0
    printed = capsys.readouterr().out.splitlines()
    scales = json.loads(file.read_text())["scales"]
    rows = [line.split() for line in printed[2:6]]
    assert [int(row[0]) for row in rows] == [1, 8, 64, 128]
    assert [scale["num_particles"] for scale in scales] == [32, 256, 2048, 4096]
    for row, scale in zip(rows, scales, strict=True):
        assert row[6] == f"{scale['seconds']['update']:.4f}"
        assert row[-3:] == [f"{scale['efficiency']:.4f}", row[-2], f"{scale['node_hours']:,.1f}"]
    assert scales[0]["efficiency"] > scales[3]["efficiency"] > 0.9


def test_one_scale_says_its_parts_and_that_the_numbers_are_not_measured(capsys):
    assert plan.run(["--nodes", "2", "--gpus", "2", "--num-particles", "5"]) == 0
    printed = capsys.readouterr().out
    for words in ("counted, not measured", "an assumption", "4 shard(s) x 1 view rank(s)", "1 or 2 particle(s)", "imbalance", "not known"):
        assert words in printed
    assert re.search(r"on a GPU: \d\.\d GiB at the peak of an update, .* all points of the field at once: fits a card of 12 GB", printed)
    assert re.search(r"with the field asked in tiles of [\d,]+ points: fits a card of 8 GB", printed)


def test_memory_is_counted_of_the_run_that_was_measured(tmp_path, capsys):
    """By the count itself: of the run's own configuration, with what is planned of particles and micro-batches."""
    run_dir = tmp_path / "run"
    words = ["a duck", "--prior", "random:tiny", "--num-updates", "2", "--log-every", "1", "--no-turntables", "--run-dir", str(run_dir)]
    assert train.run([*words, "--num-particles", "1", "--render-size", "32"]) == 0
    capsys.readouterr()
    words = ("--num-particles", "12", "--gpus", "4", "--micro-batch-size", "2")
    (scale,) = planned(*words, "--measured", str(run_dir), capsys=capsys)["scales"]
    config = merge(RunConfig(), RunDirectory(run_dir).saved_config(), "test")
    expected = count_peak(dataclasses.replace(config, micro_batch_size=2), Layout.of(12, 4))
    assert scale["peak_bytes"] == pytest.approx(expected.num_bytes, rel=1e-4)


def test_a_prompt_file_multiplies_the_node_hours(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a green duck\n\n  \na red car\na blue mug")
    once = planned(capsys=capsys)["scales"][0]
    swept = planned("--prompt-file", str(tmp_path / "prompts.txt"), capsys=capsys)
    assert swept["num_prompts"] == 3
    assert swept["scales"][0]["node_hours"] == pytest.approx(3 * once["node_hours"])


def test_a_bench_file_gives_seconds_of_a_render_and_memory(tmp_path):
    times = read_measured(tmp_path / bench_file(tmp_path, bench_row(num_ranks=2), bench_row()), 1)
    seconds = [times.stages.render, times.stages.scores, times.stages.backward, times.stages.phi, times.stages.other]
    assert seconds == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.1])  # of two renders
    rest = 5 * 2**20 - 2**20 - 16 * (2 * 1000 + 500)
    assert times.sizes == Sizes(1000, 500, 2**20, rest / 2)
    assert times.source.startswith("measured on two cores")


def test_the_two_nearest_rows_on_one_rank_give_a_line_and_runs_at_the_same_time_none(tmp_path):
    def row(num_particles, render, **changes):
        return bench_row(num_particles=num_particles, stages=bench_row()["stages"] | {"render": render}, **changes)

    others = row(2, 99.0, num_runs=4), row(2, 99.0, num_ranks=4)
    file = tmp_path / bench_file(tmp_path, *others, row(1, 0.5), row(4, 0.8), row(16, 3.2))
    near, far = read_measured(file, 2), read_measured(file, 9)
    assert (near.stages.render, near.fixed.render) == pytest.approx((0.1, 0.4))  # 0.5 = 0.4 + 0.1, 0.8 = 0.4 + 4 * 0.1
    assert (far.stages.render, far.fixed.render) == pytest.approx((0.2, 0.0))
    assert (near.stages.scores, near.fixed.scores) == pytest.approx((0.0, 0.4))  # as long with 4 as with 1


def test_a_line_has_no_negative_part():
    short, long = StageSeconds(1.0, 1.0, 1.0, 1.0), StageSeconds(0.5, 1.0, 2.0, 8.0)
    each, fixed = line_through({2: short, 4: long})
    assert each == StageSeconds(0.0, 0.0, 0.5, 2.0)
    assert fixed == StageSeconds(0.5, 1.0, 0.0, 0.0)


def test_fixed_seconds_are_paid_once_by_every_rank():
    fixed = StageSeconds(1.0, 2.0, 3.0, 4.0, 5.0)
    cost = cost_of(5, 1, 4, num_phi_steps=2, fixed=fixed)
    assert cost.compute == pytest.approx(1 + 2 + 3 + 2 * 4 + 5 + 1.25 * (0.6 + 2 * 0.4))
    assert cost.imbalance == pytest.approx(0.75 * (0.6 + 2 * 0.4))


def test_a_bench_files_stages_are_what_one_rank_is_foretold(tmp_path, capsys):
    file = bench_file(tmp_path, bench_row())
    (scale,) = planned("--gpus", "1", "--num-particles", "2", "--measured", file, capsys=capsys)["scales"]
    assert scale["seconds"]["update"] == pytest.approx(2.2)


def test_a_run_directory_gives_medians_over_the_renders_of_its_ranks(tmp_path):
    other = ['{"update": 2, "event": "resumed"}', '{"half', "[[[", "null", '{"seconds/render": null}']
    lines = [seconds_line(100), seconds_line(), *other, seconds_line(1.1), seconds_line(0.9)]
    times = read_measured(run_directory(tmp_path, lines=lines), 1)
    # Three particles on two ranks: 1.5 renders on average; phi took two steps.
    seconds = [times.stages.render, times.stages.scores, times.stages.backward, times.stages.phi, times.stages.other]
    assert seconds == pytest.approx([2, 4, 6, 4, 2])
    assert times.sizes == Sizes(140, 23, None, None)
    assert "contain reductions and waiting" in times.source


def test_a_run_by_sds_has_no_phi(tmp_path, capsys):
    line = json.dumps({f"seconds/{name}": 1.0 for name in ("render", "scores", "backward", "update")})
    folder = run_directory(tmp_path, num_particles=1, world_size=1, lines=[line], phi=False)
    (scale,) = planned("--nodes", "4", "--measured", str(folder), capsys=capsys)["scales"]
    assert (scale["seconds"]["phi"], scale["seconds"]["phi_reduction"], scale["sizes"]["phi_numbers"]) == (0.0, 0.0, 0)


# Bad input


def refused(*arguments):
    with pytest.raises(ValueError, match=".") as refusal:
        plan.run(list(map(str, arguments)))
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "0"], "--nodes must be 1 to"), (["--nodes", "1", "-3"], "got -3"), (["--gpus", "0"], "--gpus must be"),
        (["--num-particles", "0"], "--num-particles must be"), (["--particles-per-rank", "-1"], "--particles-per-rank must be"),
        (["--num-updates", "0"], "--num-updates must be"), (["--micro-batch-size", "0"], "--micro-batch-size must be"),
        (["--steps-per-update", "0"], "--steps-per-update must be"), (["--num-views", "-1"], "--num-views must be"),
        (["--nodes", "1000000", "--gpus", "1000"], "1,000,000 ranks"),
        (["--num-particles", "4", "--particles-per-rank", "2"], "give one of them"),
        (["--bandwidth-gbit", "0"], "--bandwidth-gbit must be"), (["--bandwidth-gbit", "nan"], "got nan"),
        (["--bandwidth-gbit", "inf"], "got inf"), (["--intra-bandwidth-gbit", "-1"], "--intra-bandwidth-gbit must be"),
        (["--latency-us", "-1"], "--latency-us must be"), (["--overlap", "1.5"], "--overlap must be 0 to 1"),
        (["--gpu-tflops", "0"], "--gpu-tflops must be"), (["--render-ms", "-1"], "--render-ms must be"),
        (["--measured", "x.json", "--render-ms", "1"], "drop --measured or the others"),
        (["--gpus", "8", "--num-particles", "3", "--num-views", "3"], "3 view(s)"), (["--num-shards", "3"], "num_shards"),
        (["--nodes", "many"], "many"), (["--node-count", "3"], "--node-count"), (["--nodes"], "at least one"),
        (["--prompt-file", "/no/such/file"], "can't be read"), (["--json", "/dev/null/x"], "--json"), (["--json", "/"], "--json"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_in_one_line(arguments, words):
    assert words in refused(*arguments)


def test_an_empty_prompt_file_is_refused(tmp_path):
    (tmp_path / "prompts.txt").write_text(" \n\n")
    assert "has none" in refused("--prompt-file", tmp_path / "prompts.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "can't be read" in refused("--prompt-file", tmp_path / "binary")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not JSON"), ("{", "not JSON"), ("[" * 100_000, "not JSON"), ("[]", "list of rows"), ("{}", "list of rows"),
        ('{"rows": 3}', "list of rows"), ('{"rows": [1]}', "list of rows"), ('{"rows": []}', "num_ranks 1"),
        ('{"rows": [{"num_ranks": true}]}', "num_ranks 1"), ('{"rows": [{"num_ranks": 1}]}', "num_particles"),
        ("1" * 10_000, "not JSON"),
    ],
)  # fmt: skip
def test_a_foreign_measured_file_is_refused(tmp_path, content, words):
    (tmp_path / "bench.json").write_text(content)
    assert words in refused("--measured", tmp_path / "bench.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_particles": 0}, {"num_particles": 1.5}, {"num_particles": "2"}, {"num_particles": 10**300}, {"stages": None},
        {"stages": [1, 2, 3, 4]}, {"stages": {"render": 1.0}}, {"stages": dict.fromkeys(("render", "scores", "backward", "phi"), 0)},
        {"stages": {"render": math.nan, "scores": 1, "backward": 1, "phi": 1}}, {"theta_numbers": None}, {"theta_numbers": -1},
        {"stages": {"render": "1", "scores": 1, "backward": 1, "phi": 1}}, {"phi_numbers": [500]}, {"prior_bytes": "much"},
        {"stages": {"render": math.inf, "scores": 1, "backward": 1, "phi": 1}}, {"peak_memory_mib": -5}, {"steps_per_update": 0},
        {"seconds_per_update": None},
    ],
)  # fmt: skip
def test_a_row_with_a_wrong_value_is_refused(tmp_path, changes):
    assert "bench.json" in refused("--measured", bench_file(tmp_path, bench_row(**changes)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lines": []}, "no line with the seconds"), ({"lines": ['{"seconds/render": "1"}']}, "no line with the seconds"),
        ({"lines": [seconds_line()], "world_size": "two"}, "world_size"), ({"lines": [seconds_line()], "world_size": 10**12}, "world_size"),
        ({"lines": [seconds_line()], "num_particles": 0}, "num_particles"), ({"lines": [seconds_line()], "config": "- 3"}, "key: value"),
        ({"lines": [seconds_line()], "config": "num_particles: two"}, "num_particles"),
        ({"lines": [seconds_line()], "config": "num_particles: 3\nnum_shards: 7"}, "num_shards"),
    ],
)  # fmt: skip
def test_a_run_directory_that_is_damaged_is_refused(tmp_path, options, words):
    assert words in refused("--measured", run_directory(tmp_path, **options))


def test_a_run_directory_without_what_is_needed_is_refused(tmp_path):
    assert "without config.yaml" in refused("--measured", tmp_path)
    folder = run_directory(tmp_path / "run", lines=[seconds_line()])
    (folder / "checkpoints" / "update_00000008" / "particles" / "0000.safetensors").write_bytes(b"\x08\x00")
    assert "safetensors" in refused("--measured", folder)
    (folder / "checkpoints" / "update_00000008" / "manifest.json").write_text("{")
    assert "no checkpoint" in refused("--measured", folder)
    assert "does not exist" in refused("--measured", tmp_path / "nothing.json")
    assert "does not exist" in refused("--measured", "/dev/zero")
