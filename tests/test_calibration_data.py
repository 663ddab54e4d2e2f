"""Which token sequences calibration sees."""

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers, processors

from streamquant.calibrate import data
from streamquant.calibrate.data import DEFAULT_TITLE, Calibration, CalibrationOptions, load_calibration, load_tokenizer
from streamquant.errors import NetworkError, RequestError
from tests.checkpoints import WIKI_LLAMA

TEXT = (Path(data.__file__).parent / "default_text.txt").read_text(encoding="utf-8")
BOS, EOS = 0, 1
CHAT = [{"role": "user", "content": "What is it ?"}, {"role": "assistant", "content": "A lobster ."}]
TEMPLATE = "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(WIKI_LLAMA)


@pytest.fixture
def bos_tokenizer(tokenizer: Any) -> Any:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def load(tokenizer: Any, source: Path | str | None = None, **options: Any) -> Calibration:
    return load_calibration(CalibrationOptions(data=None if source is None else str(source), **options), tokenizer)


def lists(calibration: Calibration) -> list[list[int]]:
    assert all(tokens_T.dtype == torch.int64 and tokens_T.ndim == 1 for tokens_T in calibration.samples)
    return [tokens_T.tolist() for tokens_T in calibration.samples]


def write(path: Path, content: str | bytes | list[Any]) -> Path:
    """A file with this text, or these bytes, or a list of rows as its suffix has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = json.dumps(content) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if getattr(record, "event", None) == "warning"]


# Windows


def test_windows_are_those_of_perplexity(tokenizer: Any, tmp_path: Path) -> None:
    text = (TEXT * 2)[:400_000]
    calibration = load(tokenizer, write(tmp_path / "text.txt", text), samples=10**4, sequence_length=256)
    expected = ids(tokenizer, text)  # in one piece
    num_windows = len(expected) // 256
    assert lists(calibration) == torch.tensor(expected[: num_windows * 256]).view(num_windows, 256).tolist()
    assert calibration.num_tokens == num_windows * 256
    assert calibration.title == "text.txt"


def test_the_default_text_comes_with_the_package(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    calibration = load(tokenizer)
    assert calibration.title == DEFAULT_TITLE
    assert len(calibration.samples) == len(ids(tokenizer, TEXT)) // 2048
    assert warnings(caplog) == [
        f"{DEFAULT_TITLE} gives {len(calibration.samples)} of the 512 samples of up to 2048 tokens that were asked for; give more text"
    ]
    licence = Path(data.__file__).with_name("default_text.LICENSE.md").read_text()
    assert f"{len(TEXT.encode()):,} bytes" in licence and "CC BY-SA 3.0" in licence


def test_texts_are_joined_with_eos(tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["The lobster", "", "is blue", "ends itself</s>", "."])
    parts = [ids(tokenizer, text) for text in ("The lobster", "is blue", "ends itself</s>", ".")]
    joined = [*parts[0], EOS, *parts[1], EOS, *parts[2], *parts[3]]
    assert lists(load(tokenizer, source)) == [joined]
    assert lists(load(tokenizer, source, sequence_length=3)) == [joined[i : i + 3] for i in range(0, len(joined) - 2, 3)]


def test_texts_are_joined_as_they_are_without_an_eos(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.eos_token = None
    assert lists(load(tokenizer, write(tmp_path / "a.jsonl", ["The", " lobster"]))) == [ids(tokenizer, "The") + ids(tokenizer, " lobster")]


def test_each_window_begins_as_the_tokenizer_begins_texts(bos_tokenizer: Any) -> None:
    windows = lists(load(bos_tokenizer, sequence_length=100, samples=5, seed=None))
    expected = ids(bos_tokenizer, TEXT)
    assert windows == [[BOS, *expected[i * 99 : i * 99 + 99]] for i in range(5)]


def test_less_than_a_window_is_a_shorter_window(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path / "a.txt", "The lobster is blue")
    assert lists(load(tokenizer, source, samples=2)) == [ids(tokenizer, "The lobster is blue")]
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("packed", [True, False])
def test_a_token_is_no_sample_but_bos_and_a_token_are(tokenizer: Any, tmp_path: Path, packed: bool) -> None:
    source = write(tmp_path / "a.txt", ".")
    with pytest.raises(RequestError, match=r"a\.txt gives no sample of at least 2 tokens"):
        load(tokenizer, source, packed=packed)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    assert lists(load(tokenizer, source, packed=packed)) == [[BOS, *ids(tokenizer, ".")]]


@pytest.mark.parametrize("packed", [True, False])
def test_nothing_is_no_sample(bos_tokenizer: Any, tmp_path: Path, packed: bool) -> None:
    with pytest.raises(RequestError, match="no sample"):
        load(bos_tokenizer, write(tmp_path / "a.txt", ""), packed=packed)


# One text a sample


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
def test_texts_are_cut_as_the_tokenizer_truncates(tokenizer: Any, tmp_path: Path, template: str) -> None:
    special = [(token, number) for token, number in (("<s>", BOS), ("</s>", EOS)) if token in template]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    texts = [line for line in TEXT.splitlines() if len(line) > 2][:50]
    source = write(tmp_path / "a.jsonl", ["", *texts])
    expected = [tokenizer(text, truncation=True, max_length=32)["input_ids"] for text in texts]
    assert lists(load(tokenizer, source, packed=False, sequence_length=32)) == expected


def test_what_the_text_has_is_not_added_again(bos_tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["<s>The lobster", "is blue"])
    first, second = ids(bos_tokenizer, "The lobster"), ids(bos_tokenizer, "is blue")
    assert lists(load(bos_tokenizer, source, packed=False)) == [[BOS, *first], [BOS, *second]]
    assert lists(load(bos_tokenizer, source)) == [[BOS, *first, EOS, *second]]


# Pieces


def test_pieces_have_the_tokens_of_the_whole(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PIECE_CHARS", 2000)
    monkeypatch.setattr(data, "BATCH_CHARS", 5000)
    text = TEXT[:60_000]
    assert len(list(data._pieces(text, tokenizer))) > 20
    tokens_T = torch.cat(list(data._tokenize([text], tokenizer, most=None)))
    assert tokens_T.tolist() == ids(tokenizer, text)
    assert [tokens_T.tolist() for tokens_T in data._tokenize([text, TEXT[:70]], tokenizer, most=1500)] == [
        ids(tokenizer, text)[:1500],
        ids(tokenizer, TEXT[:70]),
    ]


def test_a_text_whose_lines_have_other_tokens_stays_whole(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    monkeypatch.setattr(data, "PIECE_CHARS", 2000)
    text = "The lobster is blue .\nIt is large .\n" * 200
    assert list(data._pieces(text, tokenizer)) == [text]
    monkeypatch.setattr(data, "MAX_WHOLE_CHARS", 5000)
    with caplog.at_level(logging.INFO, logger="streamquant"):
        assert list(data._pieces(text, tokenizer)) == [text[:5000]]
    assert "is cut after 5000" in caplog.text


def test_a_text_without_lines_stays_whole(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PIECE_CHARS", 2000)
    for text in ("lobster " * 1000, "lobster" + "\n" * 5000):  # nobody sees from the middle of a run of blanks how long it is
        assert list(data._pieces(text, tokenizer)) == [text]


def test_nothing_warns_of_texts_longer_than_the_model(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        load(tokenizer, samples=1)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records


# The choice of samples


@pytest.mark.parametrize("packed", [True, False])
def test_the_choice_is_random_in_order_and_repeatable(tokenizer: Any, tmp_path: Path, packed: bool) -> None:
    source = write(tmp_path / "a.jsonl", [line for line in TEXT.splitlines() if len(line) > 100])
    options = {"packed": packed, "sequence_length": 64}
    every = lists(load(tokenizer, source, samples=10**5, **options))
    chosen = load(tokenizer, source, samples=20, seed=7, **options)
    places = [every.index(tokens) for tokens in lists(chosen)]
    assert len(places) == 20 and places == sorted(set(places)) and places[-1] - places[0] > len(every) // 2
    again = load(tokenizer, source, samples=20, seed=7, **options)
    assert (lists(again), again.digest, again.title) == (lists(chosen), chosen.digest, chosen.title)
    other = load(tokenizer, source, samples=20, seed=8, **options)
    assert lists(other) != lists(chosen) and other.digest != chosen.digest
    assert lists(load(tokenizer, source, samples=20, seed=None, **options)) == every[:20]


def test_enough_samples_warn_of_nothing(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert load(tokenizer, samples=10, sequence_length=64).num_tokens == 640
    assert not caplog.records


def test_a_sample_holds_no_other_memory_than_its_own(tokenizer: Any) -> None:
    assert all(tokens_T.untyped_storage().nbytes() == 8 * 64 for tokens_T in load(tokenizer, samples=4, sequence_length=64).samples)


def test_digests_tell_apart_tokens_and_lengths(tokenizer: Any, tmp_path: Path) -> None:
    texts = {"a": ["The lobster", "is blue"], "b": ["The lobster is", "blue"], "c": ["The lobster", "is red"]}
    digests = [load(tokenizer, write(tmp_path / f"{name}.jsonl", rows), packed=False).digest for name, rows in texts.items()]
    assert len(set(digests)) == 3 and all(len(digest) == 64 for digest in digests)


# Files


def test_rows_have_texts_under_the_usual_names(tokenizer: Any, tmp_path: Path) -> None:
    rows = ["The lobster", {"text": "is", "id": 1}, {"content": "blue and"}, {"prompt": "very ", "completion": "large"}]
    expected = [ids(tokenizer, text) for text in ("The lobster", "is", "blue and", "very large")]
    expected = [tokens for tokens in expected if len(tokens) > 1]
    for name in ("a.jsonl", "a.json", "B.JSONL"):
        path = write(tmp_path / name.lower(), rows).rename(tmp_path / name)
        assert lists(load(tokenizer, path, packed=False)) == expected


def test_chats_go_through_the_template(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = TEMPLATE
    sharegpt = [{"from": {"user": "human", "assistant": "gpt"}[each["role"]], "value": each["content"]} for each in CHAT]
    expected = ids(tokenizer, "<s>[user] What is it ?</s>[assistant] A lobster .</s>")
    for row in ({"messages": CHAT, "prompt": "not this"}, {"conversations": sharegpt}, {"conversations": CHAT}):
        assert lists(load(tokenizer, write(tmp_path / "a.jsonl", [row]))) == [expected]


def test_the_bos_of_a_template_is_the_only_one(bos_tokenizer: Any, tmp_path: Path) -> None:
    bos_tokenizer.chat_template = TEMPLATE
    source = write(tmp_path / "a.jsonl", [{"messages": CHAT}] * 2)
    chat = ids(bos_tokenizer, "[user] What is it ?</s>[assistant] A lobster .</s>")
    assert lists(load(bos_tokenizer, source, packed=False)) == [[BOS, *chat]] * 2
    assert lists(load(bos_tokenizer, source)) == [[BOS, *chat, *chat]]


def test_text_is_read_as_python_reads_it(tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "README", b"\xef\xbb\xbfThe lobster\r\nis blue\rand \xe2\x80\x93 large\n")
    assert lists(load(tokenizer, source)) == [ids(tokenizer, "The lobster\nis blue\nand \u2013 large\n")]


def test_a_folder_is_its_files_in_order_without_hidden_ones(tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    write(folder / "b.md", "lobster is")
    write(folder / "a" / "z.txt", "The big")
    write(folder / "c.jsonl", [{"text": "blue and"}, {"text": "large too"}])
    write(folder / ".cache" / "a.txt", "hidden text")
    write(folder / ".hidden.txt", "hidden text")
    calibration = load(tokenizer, folder, packed=False)
    assert lists(calibration) == [ids(tokenizer, text) for text in ("The big", "lobster is", "blue and", "large too")]
    assert calibration.title == "folder texts"


def test_no_more_is_read_than_the_first_samples_need(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "BATCH_CHARS", 100)
    write(tmp_path / "a.txt", TEXT[:1000])
    write(tmp_path / "b.txt", b"\xff")
    for packed, samples in ((True, 10), (False, 1)):
        assert len(load(tokenizer, tmp_path, seed=None, samples=samples, sequence_length=16, packed=packed).samples) == samples
    with pytest.raises(RequestError, match=r"b\.txt"):
        load(tokenizer, tmp_path, samples=1, sequence_length=16)


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_no_more_is_read_than_the_limit(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, suffix: str
) -> None:
    monkeypatch.setattr(data, "MAX_TEXT_BYTES", 1000)
    lines = ["The lobster \u2013 is blue .\n"] * 100
    source = write(tmp_path / f"a.{suffix}", "".join(lines) if suffix == "txt" else list(lines))
    with caplog.at_level(logging.INFO, logger="streamquant"):
        calibration = load(tokenizer, source, samples=1, sequence_length=2)
    assert "only the first 1 kB are used" in caplog.text
    assert not warnings(caplog)
    monkeypatch.undo()
    every = load(tokenizer, source, samples=10**4, sequence_length=2)
    assert calibration.samples[0].tolist() in lists(every)


def test_the_limit_cuts_between_lines_or_else_between_characters() -> None:
    assert list(data._first_bytes(["ab\ncd\nef"], 7, "t")) == ["ab\ncd\n"]
    assert list(data._first_bytes(["\u2013\u2013"], 5, "t")) == ["\u2013"]
    assert list(data._first_bytes(iter(["ab", "cd", "ef"]), 3, "t")) == ["ab", "c"]
    assert list(data._first_bytes(["ab", "cd"], 4, "t")) == ["ab", "cd"]


def test_more_is_read_than_the_limit_if_asked_for(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_TEXT_BYTES", 1000)
    assert len(load(tokenizer, write(tmp_path / "a.txt", TEXT), samples=100, sequence_length=100).samples) == 100


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xffdef", "a.txt: byte 3 is no UTF-8"),
        ("a.jsonl", b'"abc"\n"\xff"\n', "a.jsonl: byte 7 is no UTF-8"),
        ("a.jsonl", b'"abc"\n\n{"text": \n', "a.jsonl, line 3 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1 is not JSON"),
        ("a.jsonl", b'"abc"\n5\n', "a.jsonl, line 2 has a number; calibration needs a string, or"),
        ("a.jsonl", b'{"text": null, "url": "x"}', r"a.jsonl, line 1 has an object with text \(null\), url \(a string\)"),
        ("a.jsonl", b'{"prompt": "a"}', "a.jsonl, line 1 has an object with prompt"),
        ("a.jsonl", b'"\\ud800"', "a.jsonl, line 1 has half a character"),
        ("a.jsonl", b'{"messages": []}', "a.jsonl, line 1 is a chat, and the tokenizer has no chat template"),
        ("a.json", b'{"text": "abc"}', "a.json has no list of texts, but an object with text"),
        ("a.json", b'["abc", [], 3]', "a.json, entry 2 has a list"),
        ("a.json", b"[", "a.json is not JSON"),
        ("a.parquet", b"PAR1", "a.parquet: parquet is not read from files; write it as .jsonl"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(tokenizer: Any, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        load(tokenizer, write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (
            TEMPLATE,
            [{"role": "user", "content": "a"}, {"text": "b"}],
            r"line 1: a message has an object with text \(a string\); a chat needs",
        ),
        (TEMPLATE, ["a"], "line 1: a message has a string"),
        (TEMPLATE, [{"from": "gpt"}], "line 1: a message has an object with from"),
        ("{{ raise_exception('Roles must alternate') }}", CHAT, "line 1: the tokenizer's chat template refuses it: Roles must alternate"),
        ("{{ messages[0].content + 1 }}", CHAT, "line 1: the tokenizer's chat template refuses it"),
    ],
)
def test_what_is_no_chat_is_refused_with_its_place(tokenizer: Any, tmp_path: Path, template: str, chat: list[Any], message: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(RequestError, match=message):
        load(tokenizer, write(tmp_path / "a.jsonl", [{"messages": chat}]))


def test_a_list_that_is_too_large_to_be_read_whole_is_refused(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_JSON_BYTES", 1000)
    with pytest.raises(RequestError, match=r"a\.json has more than 1 kB, and is read whole; write it as \.jsonl"):
        load(tokenizer, write(tmp_path / "a.json", ["The lobster"] * 100))


@pytest.mark.parametrize("name", ["missing.txt", "texts/missing.txt", "/missing", "./a/b", "a/b/c", "", "wikitext"])
def test_a_missing_path_is_said_in_one_line(tokenizer: Any, name: str) -> None:
    with pytest.raises(RequestError, match="no such file or folder; a data set of the Hub is OWNER/NAME"):
        load(tokenizer, name)


def test_what_cannot_be_read_and_empty_folders_are_refused(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="has no files"):
        load(tokenizer, tmp_path)

    def fail(*args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "a.txt", "text")
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(RequestError, match=r"cannot read .*a\.txt: Permission denied"):
        load(tokenizer, path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "--samples 0"),
        ({"sequence_length": 1}, "--sequence-length 1"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 1 << 63}, "--seed 9223372036854775808"),
    ],
)
def test_options_that_cannot_be_met_are_refused_by_name(tokenizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load(tokenizer, **options)


def test_a_sequence_has_room_for_a_token_of_the_text(tokenizer: Any) -> None:
    special = [("<s>", BOS), ("</s>", EOS)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    assert load(tokenizer, sequence_length=2, samples=5).num_tokens == 10
    with pytest.raises(RequestError, match="--sequence-length 2: the tokenizer adds 2 tokens"):
        load(tokenizer, sequence_length=2, packed=False)


# Data sets of the Hub


class FakeDataSets(SimpleNamespace):
    """`datasets`, with one data set, that notes what was asked for and how many rows were taken."""

    def __init__(self, rows: list[Any]):
        super().__init__(rows=rows, calls=[], taken=0, error=None)

    def load_dataset(self, name: str, **options: Any) -> Iterator[Any]:
        self.calls.append((name, options))
        if isinstance(self.error, ValueError | FileNotFoundError):
            raise self.error
        return self._rows()

    def _rows(self) -> Iterator[Any]:
        for row in self.rows:
            if self.error is not None:
                raise self.error
            self.taken += 1
            yield row


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeDataSets:
    fake = FakeDataSets([{"text": line} for line in TEXT.splitlines(keepends=True) if line.strip()])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("seed", [0, None])
def test_a_data_set_is_streamed_until_there_is_enough(
    tokenizer: Any, hub: FakeDataSets, monkeypatch: pytest.MonkeyPatch, seed: int | None, packed: bool
) -> None:
    monkeypatch.setattr(data, "BATCH_CHARS", 1000)
    calibration = load(tokenizer, "owner/name:validation", samples=8, sequence_length=64, seed=seed, packed=packed)
    assert hub.calls == [("owner/name", {"split": "validation", "streaming": True})]
    assert len(calibration.samples) == 8
    assert 0 < hub.taken < 30 < len(hub.rows)
    assert calibration.title == "data set owner/name, split validation"
    assert load(tokenizer, "owner/name", samples=8, seed=seed, sequence_length=64, packed=packed).digest == calibration.digest
    assert hub.calls[1] == ("owner/name", {"split": "train", "streaming": True})


def test_a_path_that_exists_is_no_data_set(tokenizer: Any, hub: FakeDataSets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "owner" / "name", "The lobster")
    assert load(tokenizer, "owner/name").title == "name"
    assert not hub.calls


def test_a_row_without_text_is_refused_with_its_number(tokenizer: Any, hub: FakeDataSets) -> None:
    hub.rows.insert(2, {"label": 1})
    with pytest.raises(RequestError, match=r"data set owner/name, split train, row 3 has an object with label \(a number\)"):
        load(tokenizer, "owner/name")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError("Dataset 'owner/name' doesn't exist"), RequestError),
        (ValueError("Bad split: x.\nAvailable: train"), RequestError),
        (ConnectionError("no route"), NetworkError),
    ],
)
def test_what_datasets_refuses_is_one_line(tokenizer: Any, hub: FakeDataSets, error: Exception, expected: type[Exception]) -> None:
    hub.error = error
    with pytest.raises(expected, match="cannot read data set owner/name, split x: ") as caught:
        load(tokenizer, "owner/name:x")
    assert "\n" not in str(caught.value)


def test_without_datasets_the_error_says_what_to_install(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RequestError, match=r"no file or folder owner/name, .* pip install datasets"):
        load(tokenizer, "owner/name")


# Tokenizers


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "config.json", "{}")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RequestError, match="has no tokenizer, which calibration needs"):
            load_tokenizer(folder)


@pytest.mark.parametrize("content", ["{", "{}", '{"version": "1.0", "model": {"type": "?"}, "added_tokens": []}'])
def test_a_tokenizer_that_is_broken_is_refused(tmp_path: Path, content: str) -> None:
    write(tmp_path / "tokenizer_config.json", (WIKI_LLAMA / "tokenizer_config.json").read_bytes())
    write(tmp_path / "tokenizer.json", content)
    with pytest.raises(RequestError, match="transformers cannot load the tokenizer in") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path) -> None:
    write(tmp_path / "tokenizer_config.json", '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}')
    write(tmp_path / "own.py", f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    with pytest.raises(RequestError, match="custom code"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RequestError, match=r"pip install 'streamquant\[calibrate\]'"):
        load_tokenizer(WIKI_LLAMA)
