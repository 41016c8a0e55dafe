"""based_on and --preset: short YAML files that only change values."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.errors import ConfigError
from toolkit.training.presets import chain_of, follow_presets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hparams" / "deep").mkdir(parents=True)
    (tmp_path / "hparams" / "base.yaml").write_text("lr: 1e-4\nmodel: !new:x.Y\n  layers: 3\n")
    (tmp_path / "hparams" / "child.yaml").write_text("# c\nbased_on: base.yaml  # why\nlr: 2e-4\nmodel:\n  layers: 4\n")
    (tmp_path / "hparams" / "deep" / "grandchild.yaml").write_text("based_on: '../child.yaml'\nupdates: 7\nlr: 3e-4\n")
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "performance.yaml").write_text("updates: 9\nvalid: []\n")
    return tmp_path / "hparams"


def test_a_whole_file_comes_back_as_it_is(folder: Path) -> None:
    assert follow_presets(folder / "base.yaml", {"lr": 5}) == (folder / "base.yaml", {"lr": 5})
    assert follow_presets(folder / "base.yaml", {"preset": "full"}) == (folder / "base.yaml", {})
    assert follow_presets(folder / "nowhere.yaml") == (folder / "nowhere.yaml", {})


def test_later_wins_along_the_chain(folder: Path) -> None:
    base, values = follow_presets(folder / "deep" / "grandchild.yaml")
    assert base.resolve() == (folder / "base.yaml").resolve()
    assert values == {"lr": 3e-4, "model.layers": 4, "updates": 7}
    _, values = follow_presets(folder / "deep" / "grandchild.yaml", {"preset": "performance", "lr": 1})
    assert values == {"lr": 1, "model.layers": 4, "updates": 9, "valid": []}
    chain = [path.name for path in chain_of(folder / "deep" / "grandchild.yaml")]
    assert chain == ["grandchild.yaml", "child.yaml", "base.yaml"]


def test_nested_and_dotted_overrides_meet(folder: Path) -> None:
    assert follow_presets(folder / "child.yaml", {"model": {"layers": 6}})[1] == {"lr": 2e-4, "model.layers": 6}


def test_errors(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"preset 'fast' is not known for .*; take one of full, performance"):
        follow_presets(folder / "child.yaml", {"preset": "fast"})
    (folder / "a.yaml").write_text("based_on: b.yaml\n")
    with pytest.raises(ConfigError, match=r"a.yaml: based_on names 'b.yaml', which is not in .*; correct the name"):
        follow_presets(folder / "a.yaml")
    (folder / "b.yaml").write_text("based_on: a.yaml\n")
    with pytest.raises(ConfigError, match="based_on leads back to this file"):
        follow_presets(folder / "a.yaml")
    (folder / "a.yaml").write_text("based_on: base.yaml\nmodel: !new:os.system\n")
    with pytest.raises(ConfigError, match="holds plain values only"):
        follow_presets(folder / "a.yaml")
