"""What is said of a plan before any work."""

import dataclasses
from pathlib import Path

import llava_fa.world.tiny
from llava_fa.cli.tables import show_plan
from llava_fa.config import FourierConfig
from llava_fa.hub import plan as planning
from llava_fa.hub.architecture import empty_model
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
