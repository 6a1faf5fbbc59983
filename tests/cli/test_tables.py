"""What is said of a plan before any work."""

import dataclasses
from pathlib import Path

import llava_fa.world.tiny
from llava_fa.cli.tables import show_plan, show_report
from llava_fa.config import FourierConfig
from llava_fa.hub import plan as planning
from llava_fa.hub.architecture import empty_model
from llava_fa.hub.inspect import inspect_model
from llava_fa.hub.report import LayerReport
from llava_fa.hub.source import open_source


def test_layers_that_could_not_be_seen_at_work_are_told(monkeypatch, capsys):
    source = open_source(Path(next(iter(llava_fa.world.tiny.__path__))))
    model = empty_model(source.folder, len(source.entries))
    whole = planning.make_plan(model, source, FourierConfig())
    show_plan(whole)
    assert whole.unseen == ()
    assert "seen at work" not in capsys.readouterr().err
    feeds = planning.observe(model)
    projector = tuple(layer.name for layer in whole.layers if "projector" in layer.name)
    unseen = (*projector, "lm_head")  # which is not compressed
    monkeypatch.setattr(planning, "observe", lambda _: dataclasses.replace(feeds, unseen=unseen))
    partial = planning.make_plan(model, source, FourierConfig())
    show_plan(partial)
    assert partial.unseen == projector
    said = " ".join(capsys.readouterr().err.split())
    assert f"{len(projector)} layers could not be seen at work" in said
    assert projector[0] in said


def test_notes_and_tokens_are_told_in_lines_however_many_layers(capsys):
    """A mixture may have thousands of experts that no token reached."""
    layers = tuple(
        LayerReport(
            f"experts.down.{i}", (8, 8), 2.0, 0.1, 0.1 if i else None, 0, tokens=1000 * i,
            notes=("nothing reached it",) * (i % 2 == 0),
        )
        for i in range(40)
    )  # fmt: skip
    report = dataclasses.replace(inspect_model("tiny"), layers=layers, ledger=None, bits_per_weight=2.0)
    show_report(report)
    said = " ".join(capsys.readouterr().out.split())
    assert "calibration: 0 to 39,000 tokens a layer, 19,500 in the middle" in said
    assert said.count("nothing reached it") == 1
    assert "experts.down.0, experts.down.2," in said
    assert "and 8 more: nothing reached it" in said
    assert " tokens " in said
    show_report(report, all_layers=True)
    assert "experts.down.38: nothing reached it" in " ".join(capsys.readouterr().out.split())
    without = tuple(dataclasses.replace(layer, tokens=None, notes=()) for layer in layers)
    show_report(dataclasses.replace(report, layers=without))
    assert "tokens" not in capsys.readouterr().out
