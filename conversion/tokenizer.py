"""xAI's tokenizer.model (SentencePiece BPE) to the files that Transformers reads, id for id.

Naming `LlamaTokenizer` beside the model file does not do: its pipeline gives other ids wherever user-defined pieces
(newlines, digits, tabs) occur. The pipeline is therefore written out in tokenizer.json:

    normalizer      put "▁" in front, spaces become "▁" (SentencePiece's dummy prefix and escaping)
    pre-tokenizer   user-defined pieces are cut out, the longest first: nothing merges with them
    model           BPE with byte fallback; the merges are those whose result is a normal piece, best score first
    decoder         "▁" to spaces, byte pieces to characters, the dummy prefix dropped
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modeling_grok1.conversion.errors import ConversionError


if TYPE_CHECKING:
    from tokenizers import Tokenizer


SPACE = "\u2581"
SPECIAL_IDS = {"pad_token": 0, "bos_token": 1, "eos_token": 2, "unk_token": 3}
# Types of a piece in sentencepiece_model.proto.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True)
class Piece:
    """One row of the vocabulary; its place in the file is its id."""

    text: str
    score: float = 0.0
    type: int = NORMAL


@dataclass(frozen=True)
class SentencePieceModel:
    """What a tokenizer.model says of itself; the defaults are those of sentencepiece_model.proto."""

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
        data = path.read_bytes()
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read ({error.strerror or error}).") from error
    refusal = ConversionError(
        f"{path}: expected a SentencePiece model, found {len(data)} bytes that are not one.",
        next_step="Download tokenizer.model again from https://github.com/xai-org/grok-1.",
    )
    try:
        sentencepiece.SentencePieceProcessor(model_proto=data)
        return _parse_model(data)
    except (RuntimeError, ValueError, struct.error, IndexError) as error:
        raise refusal from error


def _parse_model(data: bytes) -> SentencePieceModel:
    pieces, settings = [], {}
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
            settings.update({"denormalizer_charsmap": item for key, item in _fields(value) if key == 2})
    return SentencePieceModel(pieces, **settings)


def _fields(message: bytes) -> Iterator[tuple[int, object]]:
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
