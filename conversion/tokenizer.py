"""xAI's tokenizer.model (SentencePiece BPE) to the files that Transformers reads, id for id.

`LlamaTokenizer` beside the model file is not enough: its pipeline gives other ids wherever user-defined pieces
(newlines, digits, tabs) occur. tokenizer.json therefore contains the whole pipeline:

    added tokens    [PAD], [BOS], [EOS] and [UNK] in a text are those tokens, as chat templates and trainers expect
    normalizer      spaces become "▁" (SentencePiece's escaping)
    pre-tokenizer   "▁" before the text (SentencePiece's dummy prefix), but not after an added token;
                    user-defined pieces are split off, the longest first: nothing merges with them
    model           BPE with byte fallback; the merges are those whose result is a normal piece, by descending score
    decoder         "▁" to spaces, byte pieces to characters, the dummy prefix dropped

`split_special_tokens=True`, for `from_pretrained` or one call, reads the spelling of a special token as text. The ids
are then SentencePiece's for every string; without it, for every string that contains no such spelling.

Dropping the dummy prefix makes `decode(encode(text)) == text`, as SentencePiece's decoding does. It is wrong
for tokens that continue a text: there the leading space belongs to the text. With `continuations=True` the decoder
keeps it, and `decode(a) + decode(b) == decode(a + b)`.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grok1.errors import ConversionError
from grok1.files import open_regular, update_sums, write_file


if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.decoders import Decoder


MAX_MODEL_BYTES = 64 * 2**20  # the release's has 2 MB
TOKENIZER_NAME = "tokenizer.model"
SPACE = "\u2581"
SPECIAL_IDS = {"pad_token": 0, "bos_token": 1, "eos_token": 2, "unk_token": 3}
# Types of a piece in sentencepiece_model.proto.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True)
class Piece:
    """One row of the vocabulary; its position in the file is its id."""

    text: str
    score: float = 0.0
    type: int = NORMAL


@dataclass(frozen=True)
class SentencePieceModel:
    """The contents of a tokenizer.model; the defaults are those of sentencepiece_model.proto."""

    pieces: list[Piece]
    model_type: int = 1
    byte_fallback: bool = False
    whitespace_as_suffix: bool = False
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    denormalizer_charsmap: bytes = b""

    def texts(self, *types: int) -> list[str]:
        return [piece.text for piece in self.pieces if piece.type in types]


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Parse a SentencePiece model file.

    Raises:
        ConversionError: the file is missing, unreadable, or not a SentencePiece model.
    """
    import sentencepiece

    try:
        with open_regular(path) as file:
            data = file.read(MAX_MODEL_BYTES)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    refusal = ConversionError(
        f"{path}: expected a SentencePiece model, found {len(data)} bytes that are not one.",
        next_step="Download tokenizer.model again from https://github.com/xai-org/grok-1.",
    )
    try:
        sentencepiece.SentencePieceProcessor(model_proto=data)
        model = _parse_model(data)
    except (RuntimeError, ValueError, LookupError, TypeError, struct.error) as error:
        raise refusal from error
    numbers = [model.model_type, *(piece.type for piece in model.pieces)]
    if not (model.pieces and all(isinstance(number, int) for number in numbers)):
        raise refusal
    if not all(isinstance(charsmap, bytes) for charsmap in (model.charsmap, model.denormalizer_charsmap)):
        raise refusal
    return model


def _parse_model(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    settings: dict[str, Any] = {}
    # The field numbers of sentencepiece_model.proto.
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            pieces.append(Piece(piece[1].decode(), score, piece.get(3, NORMAL)))
        elif number == 2:
            names = {3: "model_type", 35: "byte_fallback", 24: "whitespace_as_suffix"}
            settings.update({names[key]: item for key, item in _fields(value) if key in names})
        elif number == 3:
            names = {2: "charsmap", 3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"}
            settings.update({names[key]: item for key, item in _fields(value) if key in names})
        elif number == 5:
            settings["denormalizer_charsmap"] = dict(_fields(value)).get(2, b"")
    return SentencePieceModel(pieces, **settings)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: number, and an int (varint) or the raw bytes (all other wire types)."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == 2:
            size, position = _varint(message, position)
        else:
            size = {1: 8, 5: 4}[wire_type]
        yield number, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position


def check_supported(model: SentencePieceModel, vocab_size: int | None) -> list[str]:
    """Everything in a model file that the pipeline of this module cannot reproduce, one line per problem."""
    problems = []
    if model.model_type != 2:
        kind = MODEL_TYPES.get(model.model_type, model.model_type)
        problems.append(f"model type: expected bpe, found {kind}")
    if vocab_size is not None and len(model.pieces) > vocab_size:
        problems.append(f"pieces: expected at most the model's vocabulary of {vocab_size}, found {len(model.pieces)}")
    missing_bytes = {f"<0x{byte:02X}>" for byte in range(256)} - set(model.texts(BYTE))
    if not model.byte_fallback or missing_bytes:
        found = f"{len(missing_bytes)} of 256 missing" if model.byte_fallback else "byte fallback off"
        problems.append(f"byte pieces: expected byte fallback with all of <0x00> to <0xFF>, found {found}")
    for role, i in SPECIAL_IDS.items():
        expected = UNKNOWN if role == "unk_token" else CONTROL
        if i >= len(model.pieces) or model.pieces[i].type != expected:
            found = repr(model.pieces[i].text) if i < len(model.pieces) else "no piece"
            problems.append(f"id {i}: expected the {role.replace('_', ' ')}, found {found}")
    others = [
        f"{i} ({piece.text!r})"
        for i, piece in enumerate(model.pieces)
        if piece.type in (CONTROL, UNKNOWN, UNUSED) and i not in SPECIAL_IDS.values()
    ]
    if others:
        problems.append(f"control, unknown and unused pieces: expected ids 0 to 3 only, found {', '.join(others[:8])}")
    options: list[tuple[str, object, object]] = [
        ("normalization rules", "identity", "a character map" if model.charsmap else "identity"),
        ("denormalization rules", "none", "a character map" if model.denormalizer_charsmap else "none"),
        ("add_dummy_prefix", True, bool(model.add_dummy_prefix)),
        ("remove_extra_whitespaces", False, bool(model.remove_extra_whitespaces)),
        ("escape_whitespaces", True, bool(model.escape_whitespaces)),
        ("treat_whitespace_as_suffix", False, bool(model.whitespace_as_suffix)),
    ]
    for what, wanted, given in options:
        if wanted != given:
            problems.append(f"{what}: expected {wanted}, found {given}")
    return problems


def bpe_merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """All pairs of pieces whose union is a normal piece, in the order in which SentencePiece would merge them.

    SentencePiece stores no merges: it joins the neighbours whose union has the best score, whatever the two parts.
    """
    mergeable = {piece.text for piece in model.pieces if piece.type == NORMAL}
    by_score = sorted((piece for piece in model.pieces if piece.type == NORMAL), key=lambda piece: -piece.score)
    return [
        (piece.text[:cut], piece.text[cut:])
        for piece in by_score
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in mergeable and piece.text[cut:] in mergeable
    ]


def build_tokenizer(model: SentencePieceModel, continuations: bool = False) -> Tokenizer:
    """The pipeline at the top of this module, for a model without problems.

    Args:
        continuations: decode additively, with the dummy prefix of a whole text kept.

    Raises:
        ConversionError: the vocabulary has normal pieces that the merges cannot make.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocab = {piece.text: i for i, piece in enumerate(model.pieces)}
    unk_token = model.pieces[SPECIAL_IDS["unk_token"]].text
    merges = bpe_merges(model)

    # A segment that is itself a piece becomes that piece (`ignore_merges`): user-defined pieces, which no merge makes,
    # get their ids like that. Two kinds of pieces must then not occur: normal ones that merging would not have made,
    # and the spellings of special and byte pieces, which are plain text where they occur in text.
    bpe = models.BPE(vocab, merges, unk_token=unk_token, byte_fallback=True, fuse_unk=False)
    unreachable = [text for text in model.texts(NORMAL) if [token.value for token in bpe.tokenize(text)] != [text]]
    if unreachable:
        shown = ", ".join(map(repr, unreachable[:8]))
        raise ConversionError(
            f"The tokenizer has {len(unreachable)} normal pieces that no sequence of merges makes: {shown}."
        )
    # Spaces are "▁" before pieces are matched, in SentencePiece too: pieces with a space never occur.
    user_defined = sorted((text for text in model.texts(USER_DEFINED) if " " not in text), key=len, reverse=True)
    splits = ["|".join(map(re.escape, user_defined))] if user_defined else []
    spellings = []
    for text in model.texts(CONTROL, UNKNOWN, BYTE):
        if not any(piece in text for piece in user_defined):
            # Split where the segmentation has a boundary anyway, so that the parts are the same.
            first = bpe.tokenize(text)[0].value if text[0] in vocab else text[0]
            spellings.append(rf"\A{re.escape(first)}(?={re.escape(text[len(first) :])}\z)")
    splits += ["|".join(spellings)] if spellings else []

    bpe.ignore_merges = True
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    # The first step adds a space before the text, but not after an added token. It would not do so if the text began
    # with a space, but the normalizer has replaced all spaces. The second step makes it "▁".
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False),
            pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False),
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splits),
        ]
    )
    tokenizer.decoder = build_decoder(continuations)
    tokenizer.add_special_tokens(
        [AddedToken(model.pieces[i].text, special=True, normalized=False) for i in SPECIAL_IDS.values()]
    )
    return tokenizer


def build_decoder(continuations: bool) -> Decoder:
    """The decoder at the top of this module."""
    from tokenizers import decoders

    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps if continuations else [*steps, decoders.Strip(" ", 1, 0)])


def change_decoder(folder: Path, *, continuations: bool) -> None:
    """Replace the decoder in the tokenizer.json of a folder, and its sum if the folder has sums.

    Everything else stays: added tokens, a chat template, and the ids.

    Args:
        folder: a converted folder, or one that `convert_tokenizer` wrote.
        continuations: see `convert_tokenizer`.

    Raises:
        ConversionError: there is no tokenizer.json, or it has another decoder than those of `build_decoder`.
    """
    from tokenizers import Tokenizer

    file = Path(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers has no class of its own
        raise ConversionError(f"{file}: expected a tokenizer, found none ({error}).") from error
    known = [build_decoder(choice).__getstate__() for choice in (True, False)]
    if tokenizer.decoder is None or tokenizer.decoder.__getstate__() not in known:
        raise ConversionError(
            f"{file}: expected the decoder of a converted Grok-1, found {tokenizer.decoder}.",
            next_step=f"Write the tokenizer again: grok1 tokenizer TOKENIZER.MODEL {folder}",
        )
    tokenizer.decoder = build_decoder(continuations)
    write_file(file, tokenizer.to_str().encode())
    update_sums(Path(folder), file.name)


def convert_tokenizer(
    tokenizer_model: Path, out: Path, vocab_size: int | None = None, *, continuations: bool = False
) -> None:
    """Write `tokenizer.model` (a copy), `tokenizer.json` and `tokenizer_config.json` into the folder `out`.

    Args:
        tokenizer_model: a SentencePiece BPE model with byte fallback, as xAI released it.
        out: created if it does not exist; files of the three names are replaced.
        vocab_size: rows of the model's embedding. A tokenizer with more pieces is refused.
        continuations: write a decoder that is additive, for programs that decode a completion separately. A whole text
            is then decoded with a leading space. Encoding is the same.

    Raises:
        ConversionError: the file cannot be read or holds a tokenizer that these files could not reproduce id for id;
            nothing is written then.
    """
    tokenizer_model, out = Path(tokenizer_model), Path(out)
    model = read_sentencepiece(tokenizer_model)
    problems = check_supported(model, vocab_size)
    if problems:
        raise ConversionError(
            f"{tokenizer_model}: not a tokenizer of Grok-1's kind.",
            problems,
            "Give the tokenizer.model that was released with the checkpoint.",
        )
    config = {
        "tokenizer_class": "TokenizersBackend",
        "backend": "tokenizers",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": True,  # says what tokenizer.json does; Transformers does not read it
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "split_special_tokens": False,
        **{role: model.pieces[i].text for role, i in SPECIAL_IDS.items()},
    }
    files = {
        TOKENIZER_NAME: tokenizer_model.read_bytes(),
        "tokenizer.json": build_tokenizer(model, continuations).to_str().encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_file(out / name, content)
    update_sums(out, *files)
