"""``python -m toolkit shards MANIFEST FOLDER``: pack a manifest into tar shards; ``--verify`` checks them."""

from __future__ import annotations

import argparse
import os

from toolkit.data.manifest import read_manifest
from toolkit.data.shards import PackReport, pack, verify
from toolkit.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the subcommand."""
    parser.add_argument("source", metavar="MANIFEST", help="a manifest of any kind; with --verify a folder of shards")
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="a new one, or one whose packing was interrupted")
    parser.add_argument("--shard_mb", type=float, default=500, help="megabytes of a shard, about (default 500)")
    parser.add_argument("--pcm", type=int, metavar="HZ", help="store 16-bit WAV of this rate: larger, read faster")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="random order within the shards, for streaming")
    parser.add_argument(
        "--check", choices=("decode", "header"), default="decode", help="read all audio to its end, or headers only"
    )
    parser.add_argument("--max_bad_share", type=float, default=0.01, help="share of bad audio that may be left out")
    parser.add_argument("--workers", type=int, help="processes that pack (default: the cores, 8 at most)")
    parser.add_argument("--data_folder", help="what $data_root in the manifest stands for")
    parser.add_argument("--verify", action="store_true", help="compare a folder of shards with its checksums")


def run_command(arguments: argparse.Namespace) -> int:
    """Pack or verify, and say what stands there."""
    if arguments.verify:
        if arguments.folder is not None:
            raise ConfigError("--verify takes one argument, the folder of shards; leave the other out.")
        print(f"all checksums right: {describe(verify(arguments.source))}")
        return 0
    if arguments.folder is None:
        raise ConfigError("there is no folder for the shards; name a new one behind the manifest.")
    replacements = {"data_root": arguments.data_folder} if arguments.data_folder else None
    report = pack(
        read_manifest(arguments.source, replacements=replacements),
        arguments.folder,
        shard_mb=arguments.shard_mb,
        pcm=arguments.pcm,
        shuffle=arguments.shuffle,
        check=arguments.check,
        max_bad_share=arguments.max_bad_share,
        num_workers=min(8, os.cpu_count() or 1) if arguments.workers is None else arguments.workers,
    )
    kept = f" ({report.kept} of them were there already)" if report.kept else ""
    print(f"{describe(report)}{kept}: {report.manifest}")
    return 0


def describe(report: PackReport) -> str:
    """Counts in words."""
    left_out = f", {len(report.left_out)} left out" if report.left_out else ""
    shards = "1 shard" if report.shards == 1 else f"{report.shards} shards"
    return f"{report.utterances:,} utterances{left_out} in {shards}, {report.bytes / 1e6:,.1f} MB"
