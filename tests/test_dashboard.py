"""The sweep's wandb workspace, built and serialised without a network."""

import json

import pytest

from dist_vsd.sweep.dashboard import CHARTS, MEDIA, build_workspace, push, serialize

pytest.importorskip("wandb_workspaces")


def everything(value):
    """Yield every dict in nested JSON."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from everything(item)


@pytest.fixture(scope="module")
def view():
    return json.loads(serialize(build_workspace("night", "team", "dist_vsd")))


def test_the_view_belongs_to_the_project_and_groups_the_sweeps_runs_by_prompt_and_objective(view):
    assert (view["entity"], view["project"], view["displayName"]) == ("team", "dist_vsd", "dist_vsd sweep night")
    (runs,) = view["spec"]["section"]["runSets"]
    assert runs["grouping"] == [{"section": "config", "name": name} for name in ("prompt.value", "objective.value")]
    filters = [d for d in everything(runs["filters"]) if d.get("value") == "night"]
    assert len(filters) == 1
    assert filters[0]["key"] == {"section": "run", "name": "group"}


def test_every_chart_and_every_medium_has_a_panel_over_the_update(view):
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == ["Particles", *CHARTS]
    configs = {panel["config"]["chartTitle"]: panel["config"] for section in sections for panel in section["panels"]}
    assert configs.keys() == MEDIA.keys() | {title for charts in CHARTS.values() for title in charts}
    for charts in CHARTS.values():
        for title, figures in charts.items():
            assert configs[title]["metrics"] == list(figures)
            assert configs[title]["xAxis"] == "update"
    assert [configs[title]["mediaKeys"] for title in MEDIA] == [[key] for key in MEDIA.values()]


@pytest.mark.parametrize("name", ["t3bench's \"best\"", "a\\'b", "') or ('1' == '1", "a = 1 and b != 2", "夜 🦆 <b>$(x)</b>"])
def test_a_name_is_data(name):
    view = json.loads(serialize(build_workspace(name, "team", "dist_vsd")))
    (runs,) = view["spec"]["section"]["runSets"]
    assert [d["value"] for d in everything(runs["filters"]) if d.get("key") == {"section": "run", "name": "group"}] == [name]


def test_symbols_that_wandb_refuses_in_a_views_name_are_replaced():
    assert build_workspace("lr=1e-3 🦆", "team", "dist_vsd").name == "dist_vsd sweep lr_1e-3 _"


def test_without_a_key_nothing_is_asked_and_nothing_is_sent(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="none is configured"):
        push(build_workspace("night", "team", "dist_vsd"))
