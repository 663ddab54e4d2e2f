"""Token sequences for calibration, from text files, from data sets of the Hub, or from the text that ships with the package.

Packed: texts follow each other, the tokenizer's eos between them, and are cut into windows of one length. What is left behind the last
window is dropped. Else each text is a sample, cut at the length. What the tokenizer puts around a text by itself (a bos, say) is around
a text that is a sample, and what it puts in front is in front of each window: that is what a model sees.

T tokens.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from streamquant.errors import NetworkError, RequestError
from streamquant.lazy import torch
from streamquant.sizes import format_bytes

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_TITLE = "the default text of streamquant (WikiText-2)"
DATA_SET = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?::([\w.-]+))?")
FILE_SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".parquet")
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
MAX_TEXT_BYTES = 32_000_000  # read at most, unless the samples asked for need more: a minute of tokenizing
MAX_BYTES_PER_TOKEN = 8  # more than tokenizers reach on any prose
MAX_JSON_BYTES = 256_000_000  # one document; Python's objects take several times that
MAX_WHOLE_CHARS = 8_000_000  # of a text that must be tokenized in one go: tokenizers takes 150 bytes a character
PIECE_CHARS = 100_000
BATCH_CHARS = 1_000_000
SEAM_CHARS = 1000
MAX_MISSES = 20
LOGGER = logging.getLogger("streamquant")


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """What a user may ask for."""

    data: str | None = None  # a file, a folder, or OWNER/NAME[:SPLIT] of a data set on the Hub; None: the text that ships with the package
    samples: int = 512
    sequence_length: int = 2048
    packed: bool = True  # texts joined and cut into windows of equal length; else one text a sample, cut at the length
    seed: int | None = 0  # of the choice among all samples that there are; None takes the first


class Calibration(NamedTuple):
    """The samples, in the order of the text, and what a report and a resumed job need to know of them."""

    title: str
    digest: str  # SHA-256 of lengths and token ids
    samples: tuple[Tensor, ...]  # int64 [T] each, with 2 <= T <= sequence_length

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples, with what the tokenizer adds."""
        return sum(tokens_T.numel() for tokens_T in self.samples)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint in a local folder; none of the folder's code runs. Raises RequestError if there is none."""
    if not any(path.is_file() for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
        raise RequestError(f"{folder} has no tokenizer, which calibration needs; put tokenizer.json and tokenizer_config.json into it")
    try:
        transformers = import_module("transformers")
    except ImportError as error:
        raise RequestError(f"calibration needs transformers: pip install 'streamquant[calibrate]' ({error})") from None
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # malformed files raise whatever the code meets first, and tokenizers raises Exception itself
        reason = " ".join(str(error).split())
        raise RequestError(f"transformers cannot load the tokenizer in {folder}: {type(error).__name__}: {reason}") from error


def load_calibration(options: CalibrationOptions, tokenizer: Any) -> Calibration:
    """The samples that `options` ask for, or fewer, with a warning, if there are no more.

    The same texts, tokenizer and options give the same samples. Raises RequestError for what cannot be read, or gives no sample.
    """
    if options.samples < 1:
        raise RequestError(f"--samples {options.samples}: calibration needs at least 1")
    if options.sequence_length < 2:
        raise RequestError(f"--sequence-length {options.sequence_length}: a sequence needs at least 2 tokens, to have one to predict")
    if options.seed is not None and not 0 <= options.seed < 1 << 63:
        raise RequestError(f"--seed {options.seed}: give a number from 0 to 2**63 - 1")
    leading_T, trailing_T = _added_tokens(tokenizer)
    num_added = len(leading_T) + (0 if options.packed else len(trailing_T))
    if options.sequence_length <= num_added:
        raise RequestError(f"--sequence-length {options.sequence_length}: the tokenizer adds {num_added} tokens, which leaves no room")

    max_bytes = max(MAX_TEXT_BYTES, options.samples * options.sequence_length * MAX_BYTES_PER_TOKEN)
    title, texts, is_remote = _open(options.data, tokenizer, max_bytes)
    texts = _first_bytes(texts, max_bytes, title)
    stops = options.seed is None or is_remote  # else there is something to choose from
    room = options.sequence_length - num_added
    if options.packed:
        found = _windows(texts, tokenizer, leading_T, length=room, enough=options.samples if stops else None)
    else:
        every = _cut_texts(texts, tokenizer, leading_T, trailing_T, length=room)
        found = list(itertools.islice(every, options.samples if stops else None))
    if not found:
        raise RequestError(f"{title} gives no sample of at least 2 tokens; give more text")
    if len(found) < options.samples:
        message = "%s gives %d of the %d samples of up to %d tokens that were asked for; give more text"
        LOGGER.warning(message, title, len(found), options.samples, options.sequence_length, extra={"event": "warning"})
    samples = tuple(found[index].long() for index in _choice(len(found), options))
    return Calibration(title, _digest(samples), samples)


def _choice(num_found: int, options: CalibrationOptions) -> list[int]:
    if options.seed is None or num_found <= options.samples:
        return list(range(min(num_found, options.samples)))
    generator = torch.Generator().manual_seed(options.seed)
    return sorted(torch.randperm(num_found, generator=generator)[: options.samples].tolist())


def _digest(samples: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tokens_T in samples:
        digest.update(tokens_T.numel().to_bytes(8, "little"))
        digest.update(tokens_T.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


# From texts to samples


def _windows(texts: Iterable[str], tokenizer: Any, leading_T: Tensor, *, length: int, enough: int | None) -> list[Tensor]:
    """Windows of `length` tokens of the texts behind `leading_T`: all, or the first that are `enough`. A shorter one if none is full."""
    eos = getattr(tokenizer, "eos_token_id", None)
    most = None if enough is None else enough * length
    found: list[Tensor] = []
    num_tokens = 0
    for tokens_T in _tokenize(texts, tokenizer, most=None if most is None else most + len(leading_T)):
        text_T = tokens_T[len(leading_T) :] if _starts_with(tokens_T, leading_T) else tokens_T  # a chat template's
        if len(text_T) == 0:
            continue
        if found and eos is not None and found[-1][-1] != eos:  # a chat template may write one itself
            text_T = torch.cat([torch.tensor([eos], dtype=torch.int32), text_T])
        found.append(text_T)
        num_tokens += len(text_T)
        if most is not None and num_tokens >= most:
            break
    if len(leading_T) + num_tokens < 2:
        return []
    packed_T = torch.cat(found)
    num_windows = num_tokens // length
    if not num_windows:
        return [torch.cat([leading_T, packed_T])]
    starts = range(0, num_windows * length, length)[:enough]
    return [torch.cat([leading_T, packed_T[start : start + length]]) for start in starts]


def _cut_texts(texts: Iterable[str], tokenizer: Any, leading_T: Tensor, trailing_T: Tensor, *, length: int) -> Iterator[Tensor]:
    """The first `length` tokens of each text, between what the tokenizer adds; texts that leave one token are left out."""
    for tokens_T in _tokenize(texts, tokenizer, most=length + len(leading_T) + len(trailing_T)):
        text_T = tokens_T[len(leading_T) :] if _starts_with(tokens_T, leading_T) else tokens_T  # a chat template's
        if len(trailing_T) and text_T[-len(trailing_T) :].equal(trailing_T):
            text_T = text_T[: -len(trailing_T)]
        sample_T = torch.cat([leading_T, text_T[:length], trailing_T])
        if len(text_T) and len(sample_T) >= 2:
            yield sample_T


def _starts_with(tokens_T: Tensor, leading_T: Tensor) -> bool:
    return len(leading_T) > 0 and tokens_T[: len(leading_T)].equal(leading_T)


def _added_tokens(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """What the tokenizer puts in front of a text and behind it, unless told otherwise."""
    plain, default = _token_ids(tokenizer, "a"), list(tokenizer("a", verbose=False)["input_ids"])
    start = next((i for i in range(len(default)) if default[i : i + len(plain)] == plain), len(default))
    leading, trailing = (default[:start], default[start + len(plain) :]) if start < len(default) else ([], [])
    return torch.tensor(leading, dtype=torch.int32), torch.tensor(trailing, dtype=torch.int32)


def _tokenize(texts: Iterable[str], tokenizer: Any, *, most: int | None) -> Iterator[Tensor]:
    """The tokens (int32) of each text that has any, without special ones, cut after `most`."""
    pieces = ((number, piece) for number, text in enumerate(texts) for piece in _pieces(text, tokenizer))
    tokenized = (entry for batch in _batches(pieces) for entry in _tokenize_batch(batch, tokenizer))
    for _, entries in itertools.groupby(tokenized, key=lambda entry: entry[0]):
        found: list[Tensor] = []
        num_tokens = 0
        for _, tokens_T in entries:
            found.append(tokens_T)
            num_tokens += len(tokens_T)
            if most is not None and num_tokens >= most:
                break
        if num_tokens:
            yield torch.cat(found)[:most]


def _tokenize_batch(batch: list[tuple[int, str]], tokenizer: Any) -> Iterator[tuple[int, Tensor]]:
    ids = _token_ids(tokenizer, [piece for _, piece in batch])
    return ((number, torch.tensor(each, dtype=torch.int32)) for (number, _), each in zip(batch, ids, strict=True))


def _batches(pieces: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Pieces of which tokenizers has several at once, for its threads."""
    batch: list[tuple[int, str]] = []
    num_chars = 0
    for number, piece in pieces:
        batch.append((number, piece))
        num_chars += len(piece)
        if num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _pieces(text: str, tokenizer: Any) -> Iterator[str]:
    """The text, cut behind some ends of lines where that leaves the tokens as they are: tokenizing takes 150 bytes a character."""
    start, end, misses = 0, PIECE_CHARS, 0
    while misses < MAX_MISSES and (end := text.find("\n", end) + 1):
        if _is_seam(text, end, tokenizer):
            yield text[start:end]
            start, end, misses = end, end + PIECE_CHARS, 0
        else:
            misses += 1
    if len(text) - start > MAX_WHOLE_CHARS:
        LOGGER.info("a text of %d characters is cut after %d: its lines cannot be tokenized one by one", len(text), start + MAX_WHOLE_CHARS)
    if start < len(text):
        yield text[start : start + MAX_WHOLE_CHARS]


def _is_seam(text: str, end: int, tokenizer: Any) -> bool:
    """Whether what is around this place has the same tokens in one piece and in two."""
    before, after = text[max(0, end - SEAM_CHARS) : end], text[end : end + SEAM_CHARS]
    if not before.strip() or not after.strip():
        return False  # amid blanks, of which tokenizers look at more than we do
    return bool(_token_ids(tokenizer, before) + _token_ids(tokenizer, after) == _token_ids(tokenizer, before + after))


def _token_ids(tokenizer: Any, text: str | list[str]) -> Any:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # verbose warns of texts that are longer than the model


# From files and data sets to texts


def _open(source: str | None, tokenizer: Any, max_bytes: int) -> tuple[str, Iterator[str], bool]:
    """A title, the texts, and whether they come over the network."""
    if source is None:
        text = (files("streamquant.calibrate") / "default_text.txt").read_text(encoding="utf-8")
        return DEFAULT_TITLE, iter([text]), False
    path = Path(source)
    if source and path.is_dir():
        paths = [each for each in sorted(path.rglob("*")) if each.is_file() and not _is_hidden(each.relative_to(path))]
        if not paths:
            raise RequestError(f"{path} has no files; calibration needs text")
        texts = (text for each in paths for text in _read_file(each, tokenizer, max_bytes))
        return f"folder {path.resolve().name}", texts, False
    if source and path.exists():
        return path.name, _read_file(path, tokenizer, max_bytes), False
    match = DATA_SET.fullmatch(source)
    if match is None or source.lower().endswith(FILE_SUFFIXES):
        raise RequestError(f"{source or repr(source)}: no such file or folder; a data set of the Hub is OWNER/NAME or OWNER/NAME:SPLIT")
    name, split = match[1], match[2] or "train"
    return f"data set {name}, split {split}", _read_data_set(name, split, tokenizer), True


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _first_bytes(texts: Iterable[str], max_bytes: int, title: str) -> Iterator[str]:
    """The texts until they have so many bytes, the last one cut at the end of a line if it has one."""
    num_bytes = 0
    for text in texts:
        encoded = text.encode()
        num_bytes += len(encoded)
        if num_bytes > max_bytes:
            LOGGER.info("%s: only the first %s are used", title, format_bytes(max_bytes))
            kept = encoded[: max_bytes + len(encoded) - num_bytes]
            yield kept[: kept.rfind(b"\n") + 1 or None].decode(errors="ignore")
            return
        yield text


def _read_file(path: Path, tokenizer: Any, max_bytes: int) -> Iterator[str]:
    try:
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            way_out = "write it as .jsonl (pandas: to_json(lines=True, orient='records')), or name the data set on the Hub"
            raise RequestError(f"{path}: parquet is not read from files; {way_out}")
        if suffix == ".jsonl":
            yield from _read_lines(path, tokenizer)
        elif suffix == ".json":
            yield from _read_list(path, tokenizer)
        else:
            with path.open("rb") as file:
                yield _decode(file.read(max_bytes + 4), path)  # so that who cuts it at max_bytes sees that there is more
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from None


def _decode(encoded: bytes, path: Path, *, offset: int = 0) -> str:
    """The text as Python's text files have it. A character that the end cuts through is left out."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(encoded)
    except UnicodeDecodeError as error:
        way_out = "convert it, or leave the file out"
        raise RequestError(f"{path}: byte {offset + error.start} is no UTF-8 ({error.reason}); {way_out}") from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _read_lines(path: Path, tokenizer: Any) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_JSON_BYTES), b""), start=1):
            if line.strip():
                yield _row_text(_parse(_decode(line, path, offset=offset), f"{path}, line {number}"), tokenizer, f"{path}, line {number}")
            offset += len(line)


def _read_list(path: Path, tokenizer: Any) -> Iterator[str]:
    with path.open("rb") as file:
        encoded = file.read(MAX_JSON_BYTES + 1)
    if len(encoded) > MAX_JSON_BYTES:
        raise RequestError(f"{path} has more than {format_bytes(MAX_JSON_BYTES)}, and is read whole; write it as .jsonl")
    rows = _parse(_decode(encoded, path), str(path))
    if not isinstance(rows, list):
        raise RequestError(f"{path} has no list of texts, but {_kind(rows)}; write one object a line as .jsonl, or a list")
    for number, row in enumerate(rows, start=1):
        yield _row_text(row, tokenizer, f"{path}, entry {number}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON: {error}") from None


def _read_data_set(name: str, split: str, tokenizer: Any) -> Iterator[str]:
    for number, row in enumerate(_rows(name, split), start=1):
        yield _row_text(row, tokenizer, f"data set {name}, split {split}, row {number}")


def _rows(name: str, split: str) -> Iterator[Any]:
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        way_out = "pip install datasets, or give a text file"
        raise RequestError(f"no file or folder {name}, and data sets of the Hub need a package: {way_out} ({error})") from None
    try:
        yield from datasets.load_dataset(name, split=split, streaming=True)
    except (FileNotFoundError, ValueError) as error:  # no such data set, configuration or split
        raise RequestError(f"cannot read data set {name}, split {split}: {error}") from None
    except OSError as error:
        raise NetworkError(f"cannot read data set {name}, split {split}: {error}") from None


def _row_text(row: Any, tokenizer: Any, where: str) -> str:
    """The text of a row: a string, or an object with a text or a chat under one of the usual names."""
    fields = row if isinstance(row, dict) else {"text": row}
    chat = next((fields[key] for key in ("messages", "conversations") if isinstance(fields.get(key), list)), None)
    if isinstance(fields.get("text"), str):
        text = fields["text"]
    elif chat is not None:
        text = _chat_text(chat, tokenizer, where)
    elif isinstance(fields.get("content"), str):
        text = fields["content"]
    elif isinstance(fields.get("prompt"), str) and isinstance(fields.get("completion"), str):
        text = fields["prompt"] + fields["completion"]
    else:
        known = "text, messages, conversations, content, or prompt and completion"
        raise RequestError(f"{where} has {_kind(row)}; calibration needs a string, or an object with {known}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where} has half a character: {error.reason}") from None
    return str(text)


def _chat_text(chat: list[Any], tokenizer: Any, where: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(f"{where} is a chat, and the tokenizer has no chat template; give texts, or a tokenizer that has one")
    messages = []
    for message in chat:
        if isinstance(message, dict) and isinstance(role := message.get("role"), str):
            messages.append(message)
        elif isinstance(message, dict) and isinstance(role := message.get("from"), str) and "value" in message:
            messages.append({"role": SHAREGPT_ROLES.get(role, role), "content": message["value"]})
        else:
            raise RequestError(f"{where}: a message has {_kind(message)}; a chat needs role and content, or from and value")
    template_error = import_module("jinja2").TemplateError
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (template_error, ValueError, TypeError, LookupError) as error:
        raise RequestError(f"{where}: the tokenizer's chat template refuses it: {error}") from None


def _kind(value: Any) -> str:
    """What was there instead, in words."""
    if isinstance(value, dict) and value:
        entries = (f"{key} ({KINDS.get(type(each), 'a number')})" for key, each in value.items())
        return f"an object with {', '.join(entries)}"
    return KINDS.get(type(value), "a number")
