# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
Products on a CPU in C: weights of bfloat16, int8 and 4 bits are read as they lie in memory, widened to float32 in
registers, multiplied with activations in float32 and summed in float32. Activations are never rounded to 8 bits.

    rows_matmul     one row, or a row for each of some experts: as fast as the weights are read
    tiled_matmul    several rows: a tile of the weight is widened into the first-level cache, then shared by all rows
    floats          a weight dequantised in one pass

The source is text, because Transformers copies only the Python files of a model's remote code. The system's C compiler
translates it in about a second when a product is first needed; the library is kept in the folder of torch's extensions
(`TORCH_EXTENSIONS_DIR`, by default ~/.cache/torch_extensions) and used by every later process. Where there is no
compiler, or the processor is not an x86-64 with AVX2, or `GROK1_CPU_KERNELS=0` is set, `kernels` returns None.

It needs AVX2 and FMA only. Compiled for AVX-512 it was not faster: rows wait for memory, and the tiles were as fast on
a processor that executes 512 bits in two halves.

Letters as in quantized_grok1.py: S rows, N outputs, K inputs, G scale blocks of a row.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

FLAGS = ("-O3", "-mavx2", "-mfma", "-ffp-contract=fast", "-shared", "-fPIC")
SOURCE = r"""
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FLOAT32, BFLOAT16, INT8, INT4 };

typedef float f8 __attribute__((vector_size(32), aligned(1), may_alias));
typedef uint32_t u8 __attribute__((vector_size(32), aligned(1), may_alias));

typedef struct {
    const void *x, *weight;
    const uint16_t *scale;
    const int64_t *experts;  // of each row; null where there is one matrix
    void *y;
    int64_t S, N, K, G;
    int32_t y_kind, kind;
    const float *rows;  // x in the order that the product of a row reads
} product;

// ---------------------------------------------------------------------------------------------------------------
// Threads: those of torch. Its OpenMP library is loaded already, and a second one would compete for the processors.
// ---------------------------------------------------------------------------------------------------------------
extern void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));
extern int omp_get_thread_num(void) __attribute__((weak));
extern int omp_get_num_threads(void) __attribute__((weak));

static void run(void (*task)(void *), const product *p, int threads) {
    if (threads > 1 && GOMP_parallel && omp_get_thread_num && omp_get_num_threads)
        GOMP_parallel(task, (void *)p, threads, 0);
    else
        task((void *)p);
}

// The share of this thread in a number of equal parts.
static void share(int64_t all, int64_t *begin, int64_t *end) {
    int64_t number = omp_get_thread_num ? omp_get_thread_num() : 0;
    int64_t count = omp_get_num_threads ? omp_get_num_threads() : 1;
    *begin = all * number / count;
    *end = all * (number + 1) / count;
}

// ---------------------------------------------------------------------------------------------------------------
// Numbers
// ---------------------------------------------------------------------------------------------------------------
static inline float widen(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

// To bfloat16, to nearest, ties to even.
static inline uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

static inline f8 load(const float *p) { return *(const f8 *)p; }
static inline u8 load_bits(const void *p) { return *(const u8 *)p; }
static inline f8 splat(float value) { return (f8)_mm256_set1_ps(value); }
static inline f8 from_integers(__m256i values) { return (f8)_mm256_cvtepi32_ps(values); }
static inline f8 from_int8(const int8_t *p) {
    return from_integers(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
static inline float sum(f8 v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

static void floats_of_x(const product *p, int64_t start, int64_t count, float *out) {
    if (p->y_kind == BFLOAT16)
        for (int64_t i = 0; i < count; i++) out[i] = widen(((const uint16_t *)p->x)[start + i]);
    else
        memcpy(out, (const float *)p->x + start, count * sizeof(float));
}

// ---------------------------------------------------------------------------------------------------------------
// One row. Four outputs of four quarters of a thread's share at a time: they share each load of x, and four distant
// streams keep more of the memory busy than one, or than four adjacent rows.
// ---------------------------------------------------------------------------------------------------------------
#define STREAMS 4
#define AHEAD 512  // bytes that are fetched in advance
#define EACH_STREAM _Pragma("GCC unroll 4") for (int r = 0; r < STREAMS; r++)
#define INLINE static inline __attribute__((always_inline))

INLINE void fetch(const void *p) { _mm_prefetch((const char *)p + AHEAD, _MM_HINT_T0); }

// Pairs of bfloat16 are widened together: x has 8 even inputs before 8 odd ones.
INLINE void rows_of_bfloat16(const product *p, const float *x, const uint16_t *const *w, float *y) {
    int64_t K = p->K, k = 0;
    f8 even[STREAMS] = {0}, odd[STREAMS] = {0};
    for (; k + 16 <= K; k += 16) {
        f8 even_x = load(x + k), odd_x = load(x + k + 8);
        EACH_STREAM {
            u8 pairs = load_bits(w[r] + k);
            fetch(w[r] + k);
            even[r] += (f8)(pairs << 16) * even_x;
            odd[r] += (f8)(pairs & 0xffff0000u) * odd_x;
        }
    }
    EACH_STREAM {
        y[r] = sum(even[r] + odd[r]);
        for (int64_t i = k; i < K; i++) y[r] += widen(w[r][i]) * x[i];
    }
}

INLINE void rows_of_int8(const product *p, const float *x, const int8_t *const *w, const uint16_t *const *scale,
                         float *y) {
    int64_t group = p->K / p->G;
    f8 total[STREAMS] = {0};
    float rest[STREAMS] = {0};
    for (int64_t g = 0; g < p->G; g++) {
        f8 first[STREAMS] = {0}, second[STREAMS] = {0};
        int64_t k = g * group, end = k + group;
        for (; k + 16 <= end; k += 16) {
            f8 first_x = load(x + k), second_x = load(x + k + 8);
            EACH_STREAM {
                if (k % 64 == 0) fetch(w[r] + k);
                first[r] += from_int8(w[r] + k) * first_x;
                second[r] += from_int8(w[r] + k + 8) * second_x;
            }
        }
        EACH_STREAM {
            float s = widen(scale[r][g]), part = 0;
            total[r] += (first[r] + second[r]) * splat(s);
            for (int64_t i = k; i < end; i++) part += w[r][i] * x[i];
            rest[r] += part * s;
        }
    }
    EACH_STREAM y[r] = sum(total[r]) + rest[r];
}

// A word holds 8 values + 8. The value of number j is converted where it lies, as a multiple of 16^j, which x is
// divided by; x has inputs of one number in 8 words together, then -8 times the sum of each word's inputs.
INLINE void rows_of_int4(const product *p, const float *x, const uint32_t *const *w, const uint16_t *const *scale,
                         float *y) {
    int64_t group = p->K / p->G;
    const u8 first_half = {16, 16, 16, 16, 0, 0, 0, 0};
    f8 total[STREAMS] = {0};
    for (int64_t k = 0; k < p->K; k += 64, x += 72) {
        u8 words[STREAMS];
        f8 even[STREAMS], odd[STREAMS];
        EACH_STREAM {
            words[r] = load_bits(w[r] + k / 8);
            fetch(w[r] + k / 8);
            even[r] = load(x + 64);
            odd[r] = from_integers((__m256i)(words[r] >> 28)) * load(x + 56);
        }
        _Pragma("GCC unroll 7") for (int j = 0; j < 7; j++) {
            f8 number_x = load(x + 8 * j);
            EACH_STREAM {
                f8 part = from_integers((__m256i)(words[r] & (0xfu << 4 * j))) * number_x;
                if (j % 2) odd[r] += part;
                else even[r] += part;
            }
        }
        EACH_STREAM {
            u8 bits;
            if (group == 32) {
                uint32_t two;
                memcpy(&two, scale[r] + k / 32, 4);
                bits = (u8)_mm256_sllv_epi32(_mm256_set1_epi32(two), (__m256i)first_half) & 0xffff0000u;
            } else
                bits = (u8)_mm256_set1_epi32((uint32_t)scale[r][k / group] << 16);
            total[r] += (even[r] + odd[r]) * (f8)bits;
        }
    }
    EACH_STREAM y[r] = sum(total[r]);
}

static int64_t ordered_floats(int kind, int64_t K) { return kind == INT4 ? K / 64 * 72 : K; }

// Row s of x in the order that the product reads.
static void order_row(const product *p, int64_t s, float *row) {
    int64_t k = 0, K = p->K;
    float x[64];
    if (p->kind == BFLOAT16)
        for (; k + 16 <= K; k += 16) {
            floats_of_x(p, s * K + k, 16, x);
            for (int i = 0; i < 8; i++) row[k + i] = x[2 * i], row[k + 8 + i] = x[2 * i + 1];
        }
    if (p->kind == INT4)
        for (; k < K; k += 64, row += 72) {
            floats_of_x(p, s * K + k, 64, x);
            for (int i = 0; i < 8; i++) {
                float total = 0, factor = 1;
                for (int j = 0; j < 8; j++) {
                    row[8 * j + i] = x[8 * i + j] * factor;
                    total += x[8 * i + j];
                    factor = j == 6 ? 1 : factor / 16;  // the last number is shifted down before it is converted
                }
                row[64 + i] = -8 * total;
            }
        }
    else
        floats_of_x(p, s * K + k, K - k, row + k);
}

static void rows_task(void *argument) {
    const product *p = argument;
    int64_t N = p->N, K = p->K, begin, end, bytes = p->kind == BFLOAT16 ? 2 * K : p->kind == INT8 ? K : K / 2;
    share(N, &begin, &end);
    int64_t quarter = (end - begin + STREAMS - 1) / STREAMS;
    for (int64_t s = 0; s < p->S; s++) {
        const float *x = p->rows + s * ordered_floats(p->kind, K);
        int64_t matrix = p->experts ? p->experts[s] * N : 0;
        for (int64_t n = begin; n < begin + quarter; n++) {
            const void *w[STREAMS];
            const uint16_t *scale[STREAMS];
            float y[STREAMS];
            int64_t output[STREAMS];
            for (int r = 0; r < STREAMS; r++) {  // the last quarters may repeat the last output
                output[r] = n + r * quarter < end ? n + r * quarter : end - 1;
                w[r] = (const char *)p->weight + (matrix + output[r]) * bytes;
                scale[r] = p->scale ? p->scale + (matrix + output[r]) * p->G : 0;
            }
            if (p->kind == BFLOAT16) rows_of_bfloat16(p, x, (const uint16_t *const *)w, y);
            else if (p->kind == INT8) rows_of_int8(p, x, (const int8_t *const *)w, scale, y);
            else rows_of_int4(p, x, (const uint32_t *const *)w, scale, y);
            for (int r = 0; r < STREAMS; r++)
                if (p->y_kind == BFLOAT16) ((uint16_t *)p->y)[s * N + output[r]] = narrow(y[r]);
                else ((float *)p->y)[s * N + output[r]] = y[r];
        }
    }
}

int grok1_rows(const void *x, const void *weight, const void *scale, const void *experts, void *y, int64_t S,
               int64_t N, int64_t K, int64_t G, int y_kind, int kind, int threads) {
    int64_t floats = ordered_floats(kind, K);
    float *rows = malloc(S * floats * sizeof(float));
    if (!rows) return 1;
    product p = {x, weight, scale, experts, y, S, N, K, G, y_kind, kind, rows};
    for (int64_t s = 0; s < S; s++) order_row(&p, s, rows + s * floats);
    run(rows_task, &p, threads);
    free(rows);
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------
// Several rows
// ---------------------------------------------------------------------------------------------------------------
#define BLOCK_N 12
#define BLOCK_K 1024  // a block of widened weights is 48 KiB
#define TILE_S 4
#define TILE_N 3

// Inputs k..end of output n, as floats.
static void widen_weight(const product *p, int64_t n, int64_t k, int64_t end, float *out) {
    int64_t K = p->K, group = p->G ? K / p->G : K;
    if (p->kind == FLOAT32) memcpy(out, (const float *)p->weight + n * K + k, (end - k) * sizeof(float));
    if (p->kind == BFLOAT16) {
        const uint16_t *w = (const uint16_t *)p->weight + n * K;
        for (; k < end; k++) *out++ = widen(w[k]);
    }
    if (p->kind != INT8 && p->kind != INT4) return;
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    while (k < end) {
        int64_t g = k / group, stop = (g + 1) * group < end ? (g + 1) * group : end;
        float s = widen(p->scale[n * p->G + g]);
        if (p->kind == INT8) {
            const int8_t *w = (const int8_t *)p->weight + n * K;
            for (; k + 8 <= stop; k += 8, out += 8) *(f8 *)out = from_int8(w + k) * splat(s);
            for (; k < stop; k++) *out++ = w[k] * s;
        } else {
            const int32_t *w = (const int32_t *)p->weight + n * K / 8;
            for (; k < stop; k += 8, out += 8) {
                __m256i word = _mm256_srlv_epi32(_mm256_set1_epi32(w[k / 8]), shifts);
                __m256i value = _mm256_sub_epi32(_mm256_and_si256(word, _mm256_set1_epi32(15)), _mm256_set1_epi32(8));
                *(f8 *)out = from_integers(value) * splat(s);
            }
        }
    }
}

INLINE void tile(const float *x, int64_t K, const float *w, int64_t length, float *y, int64_t N, const int rows,
                 const int outputs) {
    f8 total[TILE_S][TILE_N] = {0};
    for (int64_t k = 0; k < length; k += 8) {
        f8 weights[TILE_N];
        _Pragma("GCC unroll 3") for (int n = 0; n < outputs; n++) weights[n] = load(w + n * BLOCK_K + k);
        _Pragma("GCC unroll 4") for (int s = 0; s < rows; s++) {
            f8 inputs = load(x + s * K + k);
            _Pragma("GCC unroll 3") for (int n = 0; n < outputs; n++) total[s][n] += inputs * weights[n];
        }
    }
    for (int s = 0; s < rows; s++)
        for (int n = 0; n < outputs; n++) y[s * N + n] += sum(total[s][n]);
}

INLINE void tiles(const float *x, int64_t K, const float *w, int64_t length, float *y, int64_t N, const int rows,
                  int outputs) {
    int n = 0;
    for (; n + TILE_N <= outputs; n += TILE_N) tile(x, K, w + n * BLOCK_K, length, y + n, N, rows, TILE_N);
    for (; n < outputs; n++) tile(x, K, w + n * BLOCK_K, length, y + n, N, rows, 1);
}

static void tiled_task(void *argument) {
    const product *p = argument;
    int64_t S = p->S, N = p->N, K = p->K, begin, end;
    float w[BLOCK_N * BLOCK_K] __attribute__((aligned(64)));
    share((N + BLOCK_N - 1) / BLOCK_N, &begin, &end);
    for (int64_t start = begin * BLOCK_N; start < end * BLOCK_N && start < N; start += BLOCK_N) {
        int outputs = start + BLOCK_N < N ? BLOCK_N : N - start;
        for (int64_t k = 0; k < K; k += BLOCK_K) {
            int64_t length = k + BLOCK_K < K ? BLOCK_K : K - k, s = 0;
            for (int n = 0; n < outputs; n++) widen_weight(p, start + n, k, k + length, w + n * BLOCK_K);
            const float *x = (const float *)p->x + k;
            float *y = (float *)p->y + start;
            for (; s + TILE_S <= S; s += TILE_S) tiles(x + s * K, K, w, length, y + s * N, N, TILE_S, outputs);
            if (S - s == 3) tiles(x + s * K, K, w, length, y + s * N, N, 3, outputs);
            if (S - s == 2) tiles(x + s * K, K, w, length, y + s * N, N, 2, outputs);
            if (S - s == 1) tiles(x + s * K, K, w, length, y + s * N, N, 1, outputs);
        }
    }
}

// x and y are float32; adds to y. K is a multiple of 8.
void grok1_tiled(const void *x, const void *weight, const void *scale, void *y, int64_t S, int64_t N, int64_t K,
                 int64_t G, int kind, int threads) {
    product p = {x, weight, scale, 0, y, S, N, K, G, FLOAT32, kind, 0};
    run(tiled_task, &p, threads);
}

// ---------------------------------------------------------------------------------------------------------------
// A weight dequantised: N K, float32 or bfloat16
// ---------------------------------------------------------------------------------------------------------------
static void floats_task(void *argument) {
    const product *p = argument;
    int64_t begin, end;
    float part[BLOCK_K];
    share(p->N, &begin, &end);
    for (int64_t n = begin; n < end; n++)
        for (int64_t k = 0; k < p->K; k += BLOCK_K) {
            int64_t length = k + BLOCK_K < p->K ? BLOCK_K : p->K - k;
            if (p->y_kind == FLOAT32) {
                widen_weight(p, n, k, k + length, (float *)p->y + n * p->K + k);
                continue;
            }
            uint16_t *y = (uint16_t *)p->y + n * p->K + k;
            widen_weight(p, n, k, k + length, part);
            for (int64_t i = 0; i < length; i++) y[i] = narrow(part[i]);
        }
}

void grok1_floats(const void *weight, const void *scale, void *y, int64_t N, int64_t K, int64_t G, int y_kind,
                  int kind, int threads) {
    product p = {0, weight, scale, 0, y, 0, N, K, G, y_kind, kind, 0};
    run(floats_task, &p, threads);
}
"""

# The numbers of the source's enum. Weights of 4 bits are those of packing_grok1.py.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.int32: 3}
POINTER, SIZE, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
ARGUMENTS = {
    "grok1_rows": [POINTER] * 5 + [SIZE] * 4 + [NUMBER] * 3,
    "grok1_tiled": [POINTER] * 4 + [SIZE] * 4 + [NUMBER] * 2,
    "grok1_floats": [POINTER] * 3 + [SIZE] * 3 + [NUMBER] * 3,
}


# --------------------------------------------------------------------------------------------------------------------
# Compiling
# --------------------------------------------------------------------------------------------------------------------
@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The compiled source, translated where no earlier process has; None where that cannot be."""
    if os.environ.get("GROK1_CPU_KERNELS") == "0" or sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    if not torch.cpu._is_avx2_supported() or (command := compiler()) is None:
        return None
    try:
        library = ctypes.CDLL(str(compiled(command)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        logger.warning_once(
            f"Grok-1's products for the CPU could not be compiled with `{command[0]}` "
            f"({detail[0] if detail else error}); torch's are used, which are slower."
        )
        return None
    for name, arguments in ARGUMENTS.items():
        getattr(library, name).argtypes = arguments
    return library


def compiler() -> list[str] | None:
    """The command of the C compiler: `$CC`, cc, gcc or clang."""
    for command in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return None


def compiled(command: list[str]) -> Path:
    """The library, named after what it is made of; written under another name first, so that it is never half there.

    Raises:
        OSError: it cannot be written.
        subprocess.SubprocessError: the compiler fails.
    """
    parts = "\0".join((SOURCE, *FLAGS, *command))
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    library = root / "grok1" / f"products_{hashlib.sha256(parts.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        logger.warning(f"Compiling Grok-1's products for the CPU with `{command[0]}`, once, into {library}.")
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            output = Path(folder) / library.name
            words = [*command, *FLAGS, "-x", "c", "-", "-o", str(output)]
            subprocess.run(words, input=SOURCE, text=True, check=True, capture_output=True, timeout=120)
            output.replace(library)
    return library


# --------------------------------------------------------------------------------------------------------------------
# Calling
# --------------------------------------------------------------------------------------------------------------------
def can_multiply_rows(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> bool:
    """Whether `rows_matmul` takes these."""
    if not are_plain(x, weight, scale) or weight.dtype == torch.float32:
        return False
    if scale is None or weight.dtype != torch.int32:
        return True
    inputs, group = x.shape[-1], x.shape[-1] // scale.shape[-1]
    return inputs % 64 == 0 and (group == 32 or group % 64 == 0)


def can_multiply_tiles(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> bool:
    """Whether `tiled_matmul` takes these."""
    if not are_plain(x, weight, scale) or x.shape[-1] % 8 != 0:
        return False
    return scale is None or weight.dtype != torch.int32 or x.shape[-1] // scale.shape[-1] % 8 == 0


def are_plain(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> bool:
    """Whether these are contiguous tensors of the kinds above on a CPU."""
    quantised = weight.dtype in (torch.int8, torch.int32)
    return (
        x.dtype in (torch.float32, torch.bfloat16)
        and weight.dtype in KINDS
        and weight.is_contiguous()
        and x.device.type == weight.device.type == "cpu"
        and (scale is not None and scale.dtype == torch.bfloat16 and scale.is_contiguous() if quantised else True)
    )


def blocks_of(scale: torch.Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if scale is None else (scale.data_ptr(), scale.shape[-1])


def rows_matmul(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None, experts: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Each row times the transpose of its matrix.

    Args:
        x: S K, bfloat16 or float32.
        weight: N K, or E N K with `experts`: bfloat16; int8; int32, 4 bits packed as in packing_grok1.py (N K/8).
        scale: N G, or E N G, bfloat16, of an int8 or packed weight.
        experts: S, int64, the matrix of each row.

    Returns:
        S N in the dtype of x, summed in float32.
    """
    library = kernels()
    assert library is not None
    x = x.contiguous()
    (S, K), N = x.shape, weight.shape[-2]  # noqa: N806
    y = x.new_empty(S, N)
    pointer, blocks = blocks_of(scale)
    if experts is not None:
        experts = experts.contiguous()
    failed = library.grok1_rows(
        x.data_ptr(),
        weight.data_ptr(),
        pointer,
        None if experts is None else experts.data_ptr(),
        y.data_ptr(),
        *(S, N, K, blocks, KINDS[x.dtype], KINDS[weight.dtype], torch.get_num_threads()),
    )
    if failed:
        raise MemoryError(f"{4 * S * K} bytes could not be allocated")
    return y


def tiled_matmul(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """x: S K, bfloat16 or float32, times the transpose of a weight (N K; as of `rows_matmul`, or float32) -> S N in
    the dtype of x, summed in float32."""
    library = kernels()
    assert library is not None
    rows = x.float().contiguous()
    (S, K), N = x.shape, weight.shape[-2]  # noqa: N806
    y = rows.new_zeros(S, N)
    pointer, blocks = blocks_of(scale)
    sizes = (S, N, K, blocks, KINDS[weight.dtype], torch.get_num_threads())
    library.grok1_tiled(rows.data_ptr(), weight.data_ptr(), pointer, y.data_ptr(), *sizes)
    return y.to(x.dtype)


def floats(weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """A weight, or a stack of weights (... N K) -> the same in bfloat16 or float32, rounded once."""
    library = kernels()
    assert library is not None
    K = weight.shape[-1] * (8 if weight.dtype == torch.int32 else 1)  # noqa: N806
    y = weight.new_empty(*weight.shape[:-1], K, dtype=dtype)
    pointer, blocks = blocks_of(scale)
    sizes = (y.numel() // K, K, blocks, KINDS[dtype], KINDS[weight.dtype], torch.get_num_threads())
    library.grok1_floats(weight.data_ptr(), pointer, y.data_ptr(), *sizes)
    return y


# Opaque to torch.compile. Transformers runs a file of remote code once per folder that it is loaded from, and an
# operator can be defined only once.
if not hasattr(torch.ops.grok1, "cpu_rows"):
    torch.library.define("grok1::cpu_rows", "(Tensor x, Tensor weight, Tensor? scale, Tensor? experts) -> Tensor")
    torch.library.impl("grok1::cpu_rows", "CPU", rows_matmul)

    @torch.library.register_fake("grok1::cpu_rows")
    def _(
        x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, experts: torch.Tensor | None
    ) -> torch.Tensor:
        return x.new_empty(x.shape[0], weight.shape[-2])
