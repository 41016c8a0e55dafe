"""The recorded runs of the original implementation, its checkpoints, and its parameter names beside ours."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from toolkit.models.convert import load_pretrained
from toolkit.models.convert.common import export_tensors
from toolkit.models.convert.fairseq_names import names_table
from toolkit.models.convert.unpickle import read_pickle

FOLDER = Path(__file__).parents[2] / "fixtures" / "fairseq_models"


def recorded(case):
    """(meta, tensors) of a recorded case."""
    folder = FOLDER / case
    return json.loads((folder / "meta.json").read_text()), load_file(folder / "tensors.safetensors")


def original(case, file="checkpoint.pt"):
    """Our model, filled from the original's checkpoint, in training mode."""
    model, info = load_pretrained(FOLDER / case / file)
    assert not info.fresh
    return model.train()


def original_tensors(case):
    """All tensors of the original's checkpoint by its own names, the teacher's after a dot."""
    tensors = {}
    for name, value in read_pickle(FOLDER / case / "checkpoint.pt")["model"].items():
        inner = {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        tensors |= inner
    return tensors


def by_original_names(kind, model, tensors):
    """Tensors by our names (gradients, say) under the original's."""
    return export_tensors(names_table(kind, model.config), tensors)


def assert_gradients(kind, model, tensors, prefix="grad."):
    """Recorded gradients, each within 1e-3 of its largest entry."""
    ours = by_original_names(kind, model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    names = [name for name in tensors if name.startswith(prefix)]
    assert names
    for name in names:
        largest = float(tensors[name].abs().max())
        torch.testing.assert_close(
            ours[name.removeprefix(prefix)],
            tensors[name],
            rtol=0,
            atol=1e-3 * largest,
            msg=lambda m, n=name: f"{n}: {m}",
        )
