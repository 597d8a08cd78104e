"""ProlificDreamer's three stages in small: what holds of a run holds of meshes in stages."""

import shutil

import pytest
import torch
import trimesh

from dist_vsd.config_files import load_preset
from dist_vsd.particles.mesh import MeshParticle
from dist_vsd.runs.saved_run import open_run
from dist_vsd.training.stages import choose_stages, set_in_stages, stages_of
from tests.ranks import run_ranks
from tests.runs import TINY, checkpoint
from tests.test_ranks import different

STAGES = ["coarse.num_updates=1", "geometry.num_updates=3", "texture.num_updates=2"]  # in geometry the band is laid anew once
WORDS = [
    "a green duck", "--preset", "object", *TINY[2:], "--num-particles", "2", "--mesh.resolution", "16", "--mesh.band-every", "2",
    "--stage", *STAGES, "--deterministic", "--keep-checkpoints", "99",
]  # fmt: skip
SHAPED, LAST = 4, 6  # updates after which geometry and texture are through
TWO_SHOTS = ["--num-views", "8"]  # of each particle, for two ranks to share


def run(folder, words, code=0, **options):
    found, output = run_ranks([*words, "--run-dir", str(folder)], **options)
    assert found == code, output
    return output


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of all three stages on one rank, with a checkpoint after each update, and what it printed."""
    folder = tmp_path_factory.mktemp("mesh") / "run"
    return folder, run(folder, [*WORDS, *TWO_SHOTS, "--checkpoint-every", "1"])


def geometry(tensors):
    return {name: tensor for name, tensor in tensors.items() if any(part in name for part in ("theta/distance", "theta/deformation"))}


def test_a_field_becomes_a_mesh_whose_geometry_and_then_colours_learn(whole):
    folder, output = whole
    for particle in (0, 1):
        assert f"particle {particle}: its surface is where the density is" in output
    began, shaped, painted = (checkpoint(folder, update) for update in (1, SHAPED, LAST))
    assert not geometry(began)
    assert len(geometry(shaped)) == 4
    assert different(geometry(shaped), geometry(painted)) == []
    colors = [name for name in painted if "theta/output.weight" in name]
    assert all(torch.equal(began[name], shaped[name]) for name in colors)
    assert not any(torch.equal(shaped[name], painted[name]) for name in colors)
    assert any(name.startswith("phi") for name in painted)
    assert not any(name.startswith("phi") for name in shaped)  # SDS has none
    assert isinstance(open_run(folder).particles[0], MeshParticle)


@pytest.mark.parametrize(("shards", "num_ranks"), [("2", 2), ("2", 4)], ids=["a particle each", "each shared by two of four"])
def test_the_layout_changes_no_bit_of_a_mesh(whole, tmp_path, shards, num_ranks):
    run(tmp_path / "run", [*WORDS, *TWO_SHOTS, "--num-shards", shards], num_ranks=num_ranks)
    assert different(checkpoint(whole[0], LAST), checkpoint(tmp_path / "run", LAST)) == []


@pytest.mark.parametrize("update", [1, 3, SHAPED, 5], ids=["before the mesh", "within geometry", "before texture", "within texture"])
def test_meshes_resume_to_the_bit(whole, tmp_path, update):
    folder, _ = whole
    shutil.copytree(folder, tmp_path / "run")
    for number in range(update + 1, LAST + 1):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"update_{number:08d}")
    assert f"resumed from update_{update:08d}" in run(tmp_path / "run", ["--resume"])
    assert different(checkpoint(folder, LAST), checkpoint(tmp_path / "run", LAST)) == []


KEPT = [*WORDS[: WORDS.index(STAGES[-1]) + 1], "texture.score.keep=true", "texture.score.lr=1e-9", *WORDS[WORDS.index("--deterministic") :]]


def test_a_kept_phi_goes_on_from_the_last_stage_that_had_one_and_resumes_to_the_bit(whole, tmp_path):
    """Over a stage that has none. At hardly any rate its matrices stay, while its moments go on."""
    output = run(tmp_path / "run", [*KEPT, *TWO_SHOTS, "--checkpoint-every", "1"])
    assert "phi goes on from where stage coarse has left it after update 1" in output
    began, painted = (checkpoint(tmp_path / "run", update) for update in (1, LAST))
    phi = [name for name in began if name.startswith("phi.")]
    steps = [name for name in began if name.startswith("phi_optimizer") and name.endswith("/step")]
    assert phi
    assert all(torch.allclose(began[name], painted[name], atol=1e-8) for name in phi)
    assert {float(painted[name] - began[name]) for name in steps} == {2.0}
    assert different(checkpoint(whole[0], SHAPED), checkpoint(tmp_path / "run", SHAPED)) == []
    for update in (SHAPED + 1, LAST):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"update_{update:08d}")
    run(tmp_path / "run", ["--resume"])
    assert different(painted, checkpoint(tmp_path / "run", LAST)) == []


def test_a_stage_that_is_done_again_keeps_the_phi_of_the_run_that_it_begins_from(whole, tmp_path):
    words = [*KEPT, "--stages", "texture", "--start-from", f"{whole[0]}@geometry"]
    assert "phi goes on from where stage coarse has left it after update 1" in run(tmp_path / "run", words)
    began, painted = checkpoint(whole[0], 1), checkpoint(tmp_path / "run", 2)
    assert all(torch.allclose(began[name], painted[name], atol=1e-8) for name in began if name.startswith("phi."))


def test_a_stage_is_done_again_from_what_another_run_has_left(whole, tmp_path):
    folder, _ = whole
    words = [*WORDS, "--stages", "texture", "--start-from", f"{folder}@geometry"]
    output = run(tmp_path / "run", words)
    assert f"particles begin as {folder}@geometry has them after update {SHAPED}" in output
    assert different(geometry(checkpoint(folder, SHAPED)), geometry(checkpoint(tmp_path / "run", 2))) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--stages", "geometry,texture"], "stage geometry begins from what stage coarse leaves: name coarse too, or --start-from RUN_DIR"),
        (["--stages", "coarse,geometri"], "--stages must name some of coarse, geometry, texture, got 'geometri' (did you mean geometry?)"),
        (["--stage", "geometri.num_updates=3"], "--stage geometri.num_updates=3: the run has no stage 'geometri' (did you mean geometry?)"),
        (["--stage", "geometry.num_updates.x=3"], "--stage geometry.num_updates.x=3: num_updates has no settings of its own: change"),
        (["--stage", "geometry.trains=[a"], "--stage geometry.trains=[a: the value can't be read: write it as in a YAML file"),
        (["--stage", "geometry.num_updates"], "--stage geometry.num_updates: must be STAGE.NAME=VALUE"),
        (["--stage", "geometry.trains=[distanse]"], "got 'distanse' (did you mean distance?)"),
        (["--stage", "texture.score={keep: true, rank: 8}"], "score.keep: stage texture has score.rank 8, coarse 4: give both the same"),
        (["--mesh.resolution", "4"], "mesh.resolution must be in [8, 512], got 4: change --mesh.resolution"),
        (["--preset", "embedded", "--stages", "coarse"], "--stages coarse: the run has none: take a preset that has stages"),
        (["--start-from", "{run}@colours"], "has no stage 'colours', it has coarse, geometry, texture"),
    ],
)
def test_wrong_words_about_stages_are_refused_in_a_line(whole, tmp_path, words, says):
    words = [word.replace("{run}", str(whole[0])) for word in words]
    base = WORDS if "embedded" not in words else ["a green duck"]
    output = run(tmp_path / "run", [*(word for word in base if word not in STAGES and word != "--stage"), *words], code=2)
    assert says in output
    assert len(output.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_stages_that_are_left_out_take_their_updates_along():
    config = set_in_stages(load_preset("object"), ["coarse.num_updates=7", "texture.score.lr=1e-4"])
    assert config.num_updates == 7 + sum(config.stages[name]["num_updates"] for name in ("geometry", "texture"))
    coarse, texture = stages_of(choose_stages(config, "texture,coarse"))
    assert (coarse.name, texture.name, texture.first) == ("coarse", "texture", 7)
    assert texture.config.score.lr == 1e-4


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("boxes")
    trimesh.creation.box((1.0, 0.5, 0.25)).export(folder / "box.glb")
    trimesh.creation.torus(0.5, 0.2, major_sections=16, minor_sections=8).export(folder / "ring.ply")
    (folder / "damaged.glb").write_bytes((folder / "box.glb").read_bytes()[:150])
    (folder / "empty.ply").write_text("ply\nformat ascii 1.0\nelement vertex 0\nend_header\n")
    (folder / "notes.txt").write_text("no mesh")
    return folder


def test_a_users_mesh_is_refined_and_then_painted(boxes, tmp_path):
    words = [*WORDS, "--init-mesh", str(boxes / "box.glb"), str(boxes / "ring.ply")]
    output = run(tmp_path / "run", words)
    assert "particle 0: it begins from a mesh of 12 faces, on the lattice" in output
    assert "particle 1: it begins from a mesh of 256 faces, on the lattice" in output
    saved = open_run(tmp_path / "run")
    assert saved.update == 5  # of geometry and texture
    vertices = saved.particles[0].surface()[0]
    assert torch.allclose(vertices.amax(0) - vertices.amin(0), torch.tensor([0.4, 1.6, 0.8]), atol=0.15)


def test_a_phi_that_nobody_has_trained_does_not_go_on(boxes, tmp_path):
    """Of the same run: it is new. Of another one, which was named: it is refused."""
    shaped = [*WORDS, "--stages", "geometry", "--init-mesh", str(boxes / "box.glb"), "--num-particles", "1"]
    assert "phi goes on" not in run(tmp_path / "shaped", shaped)
    words = [*WORDS, "--stages", "texture", "--num-particles", "1", "--start-from", str(tmp_path / "shaped")]
    output = run(tmp_path / "painted", words, code=2)
    assert "what stage texture begins from has trained no phi that could go on: say --stage texture.score.keep=false" in output
    assert not (tmp_path / "painted").exists()


def test_a_users_mesh_is_painted_as_it_is(boxes, tmp_path):
    words = [*WORDS, "--stages", "texture", "--init-mesh", str(boxes / "box.glb")]
    assert load_preset("object").stages["texture"]["score"]["keep"]  # of which there is none
    assert "particle 1: it begins from a mesh of 12 faces, which stays as it is" in run(tmp_path / "run", words)
    vertices, faces = open_run(tmp_path / "run").particles[1].surface()
    assert len(faces) == 12
    assert torch.allclose(vertices.amax(0), torch.tensor([0.2, 0.8, 0.4]), atol=1e-5)  # glTF's x, y, z are our y, z, x


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["damaged.glb"], "damaged.glb: it can't be read ("),
        (["empty.ply"], "empty.ply: it holds no triangles of finite size: check the file"),
        (["notes.txt"], "notes.txt: must be one of .glb, .gltf, .obj, .ply: convert it"),
        (["absent.glb"], "absent.glb: there is no such file: check the path"),
        (["box.glb", "box.glb", "box.glb"], "init_mesh must name one file, or one for each of 2 particles, got 3"),
        (["box.glb", "--preset", "embedded"], "--init-mesh begins meshes, the run begins with representation radiance_field: take"),
        (["box.glb", "--stages", "coarse"], "--init-mesh begins meshes, the run begins with representation radiance_field"),
    ],
)
def test_wrong_meshes_are_refused_in_a_line(boxes, tmp_path, words, says):
    words = [str(boxes / word) if "." in word else word for word in words]
    base = [word for word in WORDS if word not in STAGES and word != "--stage"] if "embedded" not in words else ["a green duck"]
    output = run(tmp_path / "run", [*base, "--init-mesh", *words], code=2)
    assert says in output
    assert len(output.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
