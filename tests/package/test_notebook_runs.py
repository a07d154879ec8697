"""examples/looking_inside.ipynb: its cells run in order and draw their figures."""

import ast
import json
from pathlib import Path

import matplotlib
import matplotlib.figure
import matplotlib.pyplot as plt
import numpy as np
import pytest


NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "looking_inside.ipynb"


@pytest.fixture
def shown(monkeypatch):
    """The figures that `plt.show()` was called with, as images."""
    matplotlib.use("Agg")
    figures = []

    def show() -> None:
        for number in plt.get_fignums():
            figures.append(rendered(plt.figure(number)))
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)
    yield figures
    plt.close("all")


def rendered(figure) -> np.ndarray:
    figure.set_dpi(50)
    canvas = matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def last_value(code: str, scope: dict) -> object:
    """Runs a cell; the value of its last line, as a notebook shows it."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), scope)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), scope)


def test_the_cells_run_in_order_and_draw(shown):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells), (
        "commit it without outputs"
    )
    scope: dict = {"__name__": "__notebook__"}
    values = [last_value("".join(cell["source"]), scope) for cell in cells]
    drawn = shown + [rendered(value) for value in values if isinstance(value, matplotlib.figure.Figure)]
    assert len(drawn) == 5
    assert all(len(np.unique(image.reshape(-1, 4), axis=0)) > 20 for image in drawn), "an empty figure"
    assert np.isfinite(scope["increase"]).all() and scope["increase"].max() > 0
    assert "Grok1TopKRouter" in repr(values[0])
