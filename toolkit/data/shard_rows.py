"""Rows of a manifest that name their audio by shard, offset and size: checked before anything is opened by them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import PurePosixPath

from toolkit.data.table import shortened
from toolkit.data.tar_format import BLOCK
from toolkit.errors import ManifestError

SHARD_COLUMNS = ("shard", "offset", "size")
"""Columns that stand in place of ``wav``: a tar in the manifest's folder, where the audio's bytes begin, how many."""

DIGITS = 18
"""Digits of an offset or a size; more would be an exabyte."""


class ShardFolder:
    """Turns the shard, offset and size of rows into the paths that :class:`~toolkit.data.audio.AudioFile` reads.

    Arguments
    ---------
    folder : the manifest's, which no shard may be outside of.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._shards: dict[str, tuple[str, int]] = {}

    def entry(self, row: Mapping[str, object], where: str) -> str:
        """``/folder/shard.tar:OFFSET:SIZE`` of a row.

        Arguments
        ---------
        row : has the three columns.
        where : manifest, line and utterance, for messages.

        Raises
        ------
        ManifestError : the shard is missing or outside the folder; or the bytes are not within it.
        """
        name = str(row["shard"]).strip()
        offset, size = (self._number(row, column, where) for column in SHARD_COLUMNS[1:])
        if name not in self._shards:
            self._shards[name] = self._shard(name, where)
        path, total = self._shards[name]
        if offset < BLOCK or offset % BLOCK:
            raise ManifestError(
                f"{where}: the offset is {offset}, but an entry of a tar begins at a multiple of {BLOCK}, behind its "
                "header; pack the shards again."
            )
        if size == 0 or offset + size > total:
            raise ManifestError(
                f"{where}: bytes {offset} to {offset + size} of {name} are asked for, which has {total}; copy the "
                "shard again, or pack the shards again."
            )
        return f"{path}:{offset}:{size}"

    def _number(self, row: Mapping[str, object], column: str, where: str) -> int:
        text = str(row.get(column, "")).strip()
        if not (text.isascii() and text.isdecimal() and len(text) <= DIGITS):
            raise ManifestError(
                f"{where}: the {column} is {shortened(repr(text))}, expected a whole number of bytes; pack the shards "
                "again."
            )
        return int(text)

    def _shard(self, name: str, where: str) -> tuple[str, int]:
        """The shard's path and size."""
        if not name.lower().endswith(".tar") or not name.isprintable():
            raise ManifestError(f"{where}: the shard is {shortened(repr(name))}, expected the name of a .tar file.")
        path = os.path.join(self.folder, name)
        # Links inside the folder are good; what they lead to has to be inside as well.
        folder, real = os.path.realpath(self.folder), os.path.realpath(path)
        if os.path.isabs(name) or ".." in PurePosixPath(name).parts or os.path.commonpath([folder, real]) != folder:
            raise ManifestError(
                f"{where}: the shard {shortened(repr(name))} is outside the manifest's folder {self.folder}; shards "
                "lie beside their manifest."
            )
        if not os.path.isfile(path):
            raise ManifestError(
                f"{where}: the shard {shortened(name)} does not exist; copy the shards to their manifest."
            )
        return path, os.path.getsize(path)
