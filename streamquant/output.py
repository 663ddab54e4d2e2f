"""The folder that a conversion writes: whose it is, whether there is room, and everything in it but the shards."""

import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamquant.checkpoint.journal import JOURNAL_NAME, RECORD_NAME, REVISION_KEY, WORK_FOLDER, Journal, read_record, require_same_job
from streamquant.checkpoint.source import Source
from streamquant.checkpoint.writer import ShardWriter, StepWriter, sync_folder, write_file
from streamquant.errors import RequestError, StorageError
from streamquant.inputs import STATED_KEYS
from streamquant.names import LANGUAGE_KEYS
from streamquant.plan import Plan, Shard
from streamquant.schemes.plain import Plain
from streamquant.version import __version__

CHUNK_BYTES = 8 << 20
BLOCK_BYTES = 512  # in which the file system counts what a file takes


def require_outside(out: str | os.PathLike[str], file: str | os.PathLike[str], *, option: str) -> None:
    """Raise RequestError if `file`, which `option` names, would become a part of the output."""
    if Path(out).resolve() in Path(file).resolve().parents:
        raise RequestError(f"{option} {file} is inside OUT, which is for the output alone; choose another place")


def job_of(plan: Plan, *, allow_nonfinite: bool, calibration: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the bytes of the output depend on: source, recipe, program version, data. Equal jobs give equal outputs."""
    checkpoint = plan.checkpoint
    revision = {} if checkpoint.revision is None else {REVISION_KEY: checkpoint.revision}
    return (
        revision
        | {
            "streamquant version": __version__,
            "recipe": {rule.pattern: "keep" if rule.scheme is None else rule.scheme.title for rule in plan.recipe.rules},
            "include": list(plan.recipe.include),
            "allow nonfinite": allow_nonfinite,
            "source files": dict(checkpoint.identity),
            "plan": plan.digest,
        }
        | ({} if calibration is None else {"calibration": dict(calibration)})
    )


def files_of(plan: Plan) -> list[str]:
    """Every file that the output will have."""
    layout = plan.checkpoint.layout
    index = [layout.index_name] if len(plan.shards) > 1 else []
    return [*(shard.file for shard in plan.shards), *plan.checkpoint.side_files, RECORD_NAME, *index, layout.config_name]


def is_finished(out: Path, job: Mapping[str, Any]) -> bool:
    """Whether `out` is the finished output of this job. Raises RequestError if it is anything else of value."""
    if out.exists() and not out.is_dir():
        raise RequestError(f"OUT {out} is a file")
    if (out / WORK_FOLDER / JOURNAL_NAME).is_file() or not out.exists() or all(path.name == WORK_FOLDER for path in out.iterdir()):
        return False
    record = out / RECORD_NAME
    if not record.is_file():
        raise RequestError(f"OUT {out} is not empty and holds no unfinished output of streamquant; choose another OUT")
    require_same_job(read_record(record)["job"], job, where=out)
    return True


def is_done(shard: Shard, out: Path, journal: Journal) -> bool:
    """Whether an earlier run has given this shard its name."""
    path = out / shard.file
    return shard.file in journal.shards and path.is_file() and path.stat().st_size == shard.num_bytes


def require_space(todo: Sequence[Shard], *, out: Path, work: Path, temporary_bytes: int) -> None:
    """Raise StorageError if the shards to do, less what they have already, and temporary files do not fit."""
    needed = sum(shard.num_bytes - _allocated(work / f"{shard.file}.part") for shard in todo) + temporary_bytes
    free = shutil.disk_usage(out).free
    if needed > free:
        raise StorageError(f"{out} needs {needed} bytes more and its file system has {free} free")


def finish(
    plan: Plan, source: Source, *, out: Path, work: Path, job: Mapping[str, Any], journal: Journal, rescaled: Sequence[str] = ()
) -> None:
    """Everything but the shards; the index and the config, which make the folder loadable, come last.

    `rescaled`: tensors between which a scale was moved, so that they cannot be compared with the source.
    """
    layout, sizes = plan.checkpoint.layout, source.sizes()
    written = {shard.file: (shard.num_bytes, journal.shards[shard.file]) for shard in plan.shards}
    for file in plan.checkpoint.side_files:
        written[file] = sizes[file], _copy(source, file, sizes[file], out / file, work=work)
    named = {layout.config_name: _json(_config(plan))}
    if len(plan.shards) > 1:
        named = {layout.index_name: _json(_index(plan))} | named
    for file, content in named.items():
        written[file] = len(content), zlib.crc32(content)
    files = {file: {"bytes": size, "crc32": f"{crc32:08x}"} for file, (size, crc32) in written.items()}
    record = {"job": job, "files": files} | ({"rescaled": list(rescaled)} if rescaled else {})
    for file, content in ({RECORD_NAME: _json(record)} | named).items():
        write_file(out / file, content, work=work)
    sync_folder(out)


def _copy(source: Source, file: str, num_bytes: int, target: Path, *, work: Path) -> int:
    """Copy a file, and return its CRC-32."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(work / "side-file.part", header=b"", num_bytes=num_bytes) as writer:
        output = StepWriter(writer)
        for start in range(0, num_bytes, CHUNK_BYTES):
            chunk = memoryview(bytearray(min(CHUNK_BYTES, num_bytes - start)))
            source.read(file, start, chunk)
            output.write(start, chunk)
        writer.publish(target)
    return output.checksum


def _allocated(path: Path) -> int:
    return path.stat().st_blocks * BLOCK_BYTES if path.is_file() else 0


def _config(plan: Plan) -> dict[str, Any]:
    """The config of the source, in its order, with the new description of the quantization and no other."""
    key = plan.checkpoint.layout.quantization_key
    config = {**(plan.checkpoint.config or {}), key: plan.quantization_config}
    config = {name: value for name, value in config.items() if (value if name == key else name not in STATED_KEYS)}
    parents = [config]
    while parents:  # of any depth, so no recursion
        parent = parents.pop()
        for name, value in parent.items():
            if isinstance(value, dict):
                parent[name] = {inner: value[inner] for inner in value if inner not in STATED_KEYS}
                parents.append(parent[name])
    unpacked = {scheme.dtype_name for scheme in plan.recipe.schemes if isinstance(scheme, Plain)}
    if len(unpacked) == 1 and not plan.quantization_config:
        _state_dtype(config, unpacked.pop())
    return config


def _state_dtype(config: dict[str, Any], dtype: str) -> None:
    """Where a config says the dtype of a model's weights, say this one."""
    for owner in (config, *(config[key] for key in LANGUAGE_KEYS if isinstance(config.get(key), dict))):
        owner.update({name: dtype for name in ("dtype", "torch_dtype") if isinstance(owner.get(name), str)})


def _index(plan: Plan) -> dict[str, Any]:
    outputs = [spec for step in plan.steps for spec in step.outputs]
    return {
        "metadata": {"total_size": sum(spec.num_bytes for spec in outputs)},
        "weight_map": {spec.name: spec.file for spec in sorted(outputs, key=lambda spec: spec.name)},
    }


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
