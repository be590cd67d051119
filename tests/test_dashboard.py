"""The Grafana dashboard is well-formed; that a server exports what it asks for is shown in `serving`."""

import itertools
import json
from pathlib import Path

DASHBOARD = Path(__file__).parents[1] / "examples" / "grafana" / "kv_compression.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def test_every_panel_has_a_place_of_its_own_and_asks_the_chosen_source():
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels, variables = dashboard["panels"], dashboard["templating"]["list"]
    assert {variable["name"]: variable["type"] for variable in variables} == {
        "datasource": "datasource",
        "model": "query",
        "engine": "query",
    }
    drawn = [panel for panel in panels if panel["type"] != "row"]
    assert len(drawn) >= 8 and len({panel["id"] for panel in panels}) == len(panels)
    for asks in [*drawn, *(target for panel in drawn for target in panel["targets"]), *variables[1:]]:
        assert asks["datasource"] == SOURCE
    squares = [set(_squares(**panel["gridPos"])) for panel in panels]
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(squares, 2))
    assert all(column < 24 for one in squares for column, _ in one)


def _squares(x: int, y: int, w: int, h: int):
    return itertools.product(range(x, x + w), range(y, y + h))
