/* One pass over bf16, fp16 or fp32 where kernel.py takes many; the same bits.
 *
 * Built with the package where there is a C compiler, called through compiled.py. Every operation
 * rounds to fp32 on its own: build with -ffp-contract=off.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("avx2", "default")))
#define CONVERTS_FP16 /* whatever has AVX2 does */
#include <immintrin.h>
#else
#define FOR_EVERY_PROCESSOR
#endif

#if defined(_MSC_VER)
#define PUBLIC __declspec(dllexport)
#define restrict __restrict
#else
#define PUBLIC __attribute__((visibility("default")))
#endif

#define TILE 4096 /* entries of a mask drawn at a time: they stay in the nearest cache */
#define PIECE 1024 /* entries of fp16 computed at a time: in fp32 they stay there as well */
#define DIGEST 16 /* bytes that seed the stream of a block */
#define STREAMS 4 /* masks drawn side by side, as many as a register has 64-bit lanes */

#if defined(__GNUC__)
typedef uint64_t lanes __attribute__((vector_size(8 * STREAMS)));
#endif

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float from_bf16(uint16_t half) { return float_of((uint32_t)half << 16); }

/* The bits of a number, of which the upper half is the nearest in bf16, ties to even. What is NaN
 * must come from bf16: then its low bits are zero and the sum does not run over. */
static inline uint32_t rounded(float value) {
    uint32_t bits = bits_of(value);
    return bits + 0x7FFFu + ((bits >> 16) & 1u);
}

/* A step of SFC64, of one stream or of those that lie in the lanes of a, b, c and w. */
#define NEXT_WORD(a, b, c, w, out)         \
    do {                                   \
        out = a + b + w;                   \
        w += 1;                            \
        a = b ^ (b >> 11);                 \
        b = c + (c << 3);                  \
        c = ((c << 24) | (c >> 40)) + out; \
    } while (0)

/* The state of SFC64 at the start of a block whose 16-byte digest is given; docs/reference/mask-format.md. */
static inline uint32_t scramble(uint32_t value, uint32_t *constant, uint32_t factor) {
    value ^= *constant;
    *constant *= factor;
    value *= *constant;
    return value ^ value >> 16;
}

static void seed_stream(const uint8_t *digest, uint64_t state[4]) {
    uint32_t pool[4], drawn[6], constant = 0x43B0D7E5u;
    memcpy(pool, digest, sizeof pool);
    for (int i = 0; i < 4; i++) pool[i] = scramble(pool[i], &constant, 0x931E8875u);
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++)
            if (i != j) {
                uint32_t other = scramble(pool[i], &constant, 0x931E8875u);
                uint32_t mixed = 0xCA01F9DDu * pool[j] - 0x4973F715u * other;
                pool[j] = mixed ^ mixed >> 16;
            }
    constant = 0x8B51F9DDu;
    for (int k = 0; k < 6; k++) drawn[k] = scramble(pool[k % 4], &constant, 0x58F38DEDu);
    uint64_t a = drawn[0] | (uint64_t)drawn[1] << 32, b = drawn[2] | (uint64_t)drawn[3] << 32;
    uint64_t c = drawn[4] | (uint64_t)drawn[5] << 32, w = 1, out;
    for (int k = 0; k < 12; k++) NEXT_WORD(a, b, c, w, out);
    state[0] = a;
    state[1] = b;
    state[2] = c;
    state[3] = w;
}

/* Compared in 16 bits, of which a register holds most: values <= last is values < last + 1. */
FOR_EVERY_PROCESSOR
static void keep_up_to(const uint16_t *restrict values, uint16_t last, uint8_t *restrict keep,
                       size_t count) {
    for (size_t i = 0; i < count; i++) keep[i] = (uint8_t)(values[i] <= last);
}

/* Mask v1 of the block of a digest: 1 where an entry is kept, else 0. */
PUBLIC void draw_keep(const uint8_t *digest, uint32_t threshold, uint8_t *keep, size_t count) {
    uint64_t state[4];
    seed_stream(digest, state);
    uint64_t a = state[0], b = state[1], c = state[2], w = state[3];
    union {
        uint64_t words[TILE / 4];
        uint16_t values[TILE];
    } drawn;
    if (!threshold) memset(keep, 0, count);
    for (size_t start = 0; threshold && start < count; start += TILE) {
        size_t size = count - start < TILE ? count - start : TILE;
        for (size_t i = 0; i < (size + 3) / 4; i++) {
            uint64_t out;
            NEXT_WORD(a, b, c, w, out);
            drawn.words[i] = out;
        }
        keep_up_to(drawn.values, (uint16_t)(threshold - 1), keep + start, size);
    }
}

/* The same for STREAMS blocks of one size, whose digests and whose masks lie one behind the other. A
 * word waits for the one before it in its stream, but not for those of other streams. */
FOR_EVERY_PROCESSOR
PUBLIC void draw_keep_of_streams(const uint8_t *digests, uint32_t threshold, uint8_t *keep,
                                 size_t count) {
#if defined(__GNUC__)
    lanes a, b, c, w;
    union {
        uint64_t words[STREAMS][TILE / 4];
        uint16_t values[STREAMS][TILE];
    } drawn;
    for (size_t s = 0; s < STREAMS; s++) {
        uint64_t state[4];
        seed_stream(digests + DIGEST * s, state);
        a[s] = state[0];
        b[s] = state[1];
        c[s] = state[2];
        w[s] = state[3];
    }
    if (!threshold) memset(keep, 0, STREAMS * count);
    for (size_t start = 0; threshold && start < count; start += TILE) {
        size_t size = count - start < TILE ? count - start : TILE;
        for (size_t i = 0; i < (size + 3) / 4; i++) {
            lanes out;
            NEXT_WORD(a, b, c, w, out);
            for (size_t s = 0; s < STREAMS; s++) drawn.words[s][i] = out[s];
        }
        for (size_t s = 0; s < STREAMS; s++)
            keep_up_to(drawn.values[s], (uint16_t)(threshold - 1), keep + s * count + start, size);
    }
#else
    for (size_t s = 0; s < STREAMS; s++)
        draw_keep(digests + DIGEST * s, threshold, keep + s * count, count);
#endif
}

/* result = anchor + third * (second * (first * (minuend - subtrahend))) where `keep` is 1, the
 * anchor where it is 0; without `keep` everywhere. Every operation is rounded to fp32, the result
 * once to what is stored. Returns whether all is finite, also what is dropped. */

#define STEP(anchor, minuend, subtrahend, keep) \
    ((anchor) + third * (second * (first * ((minuend) - (subtrahend)))) * (keep))

#define STEP_ARGUMENTS(TYPE)                                                                   \
    const TYPE *anchor, const TYPE *minuend, const TYPE *subtrahend, float first, float second, \
        float third, const uint8_t *restrict keep, TYPE *restrict result, size_t count

FOR_EVERY_PROCESSOR
PUBLIC int step_along_fp32(STEP_ARGUMENTS(float)) {
    uint32_t is_bad = 0;
    for (size_t i = 0; i < count; i++) {
        result[i] = STEP(anchor[i], minuend[i], subtrahend[i], keep ? (float)keep[i] : 1.0f);
        is_bad |= ((bits_of(result[i]) & 0x7F800000u) + 0x800000u) >> 31;
    }
    return !is_bad;
}

/* Two neighbours in bf16 are one word: each is widened, and put back, without changing its lane. */
static inline uint32_t pair_at(const uint16_t *place) {
    uint32_t pair;
    memcpy(&pair, place, sizeof pair);
    return pair;
}

static inline float low_of(uint32_t pair) { return float_of(pair << 16); }

static inline float high_of(uint32_t pair) { return float_of(pair & 0xFFFF0000u); }

static inline uint32_t pair_of(float low, float high) {
    return rounded(low) >> 16 | (rounded(high) & 0xFFFF0000u);
}

/* The top bit of a half of the sum is set where all bits of the exponent are: infinite or NaN. */
static inline uint32_t marks_of(uint32_t pair) { return (pair & 0x7F807F80u) + 0x00800080u; }

static inline uint16_t kept_at(const uint8_t *place) {
    uint16_t kept;
    memcpy(&kept, place, sizeof kept);
    return kept;
}

#define STEP_ALONG_PAIRS(KEPT)                                                                   \
    for (size_t i = 0; i + 1 < count; i += 2) {                                                  \
        uint32_t a = pair_at(anchor + i), m = pair_at(minuend + i), s = pair_at(subtrahend + i); \
        uint16_t kept = KEPT;                                                                    \
        uint32_t pair = pair_of(STEP(low_of(a), low_of(m), low_of(s), (float)(kept & 1u)),       \
                                STEP(high_of(a), high_of(m), high_of(s), (float)(kept >> 8)));   \
        memcpy(result + i, &pair, sizeof pair);                                                  \
        marks |= marks_of(pair);                                                                 \
    }

FOR_EVERY_PROCESSOR
PUBLIC int step_along_bf16(STEP_ARGUMENTS(uint16_t)) {
    uint32_t marks = 0;
    if (keep) {
        STEP_ALONG_PAIRS(kept_at(keep + i))
    } else {
        STEP_ALONG_PAIRS(0x0101u)
    }
    if (count % 2) {
        size_t last = count - 1;
        float kept = keep ? (float)keep[last] : 1.0f;
        uint32_t half = rounded(STEP(from_bf16(anchor[last]), from_bf16(minuend[last]),
                                     from_bf16(subtrahend[last]), kept)) >> 16;
        result[last] = (uint16_t)half;
        marks |= marks_of(half);
    }
    return !(marks & 0x80008000u);
}

/* bf16 to fp32, exactly. */
FOR_EVERY_PROCESSOR
PUBLIC void widen_bf16(const uint16_t *restrict stored, float *restrict wide, size_t count) {
    for (size_t i = 0; i < count; i++) wide[i] = from_bf16(stored[i]);
}

/* fp32 to the nearest bf16; NaN of any kind becomes the usual one. */
FOR_EVERY_PROCESSOR
PUBLIC void round_to_bf16(const float *restrict wide, uint16_t *restrict stored, size_t count) {
    for (size_t i = 0; i < count; i++) {
        int is_nan = (bits_of(wide[i]) & 0x7FFFFFFFu) > 0x7F800000u;
        stored[i] = is_nan ? 0x7FC0u : (uint16_t)(rounded(wide[i]) >> 16);
    }
}

/* target = first + (factor * second) * keep; target may be one of the others. */
FOR_EVERY_PROCESSOR
PUBLIC void add_dropped(const float *first, const float *second, float factor,
                        const uint8_t *restrict keep, float *target, size_t count) {
    for (size_t i = 0; i < count; i++) target[i] = first[i] + (factor * second[i]) * (float)keep[i];
}

/* fp16 to fp32, exactly. Moved up to fp32's exponent, also what is below fp16's smallest normal
 * number is off by one power of two alone; NaN becomes a quiet one, as processors have it. */
static inline float from_fp16(uint16_t half) {
    uint32_t rest = half & 0x7FFFu, sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t bits = bits_of(float_of(rest << 13) * 0x1p112f);
    bits |= (rest >= 0x7C00u ? 0x7F800000u : 0) | (rest > 0x7C00u ? 0x00400000u : 0);
    return float_of(bits | sign);
}

/* fp32 to the nearest fp16, ties to even. Below the smallest normal number fp16 is spaced as fp32
 * is from a half on, so that the sum with it rounds. */
static inline uint16_t to_fp16(float value) {
    uint32_t bits = bits_of(value), rest = bits & 0x7FFFFFFFu;
    uint32_t normal = (rest - 0x38000000u + 0xFFFu + ((rest >> 13) & 1u)) >> 13;
    uint32_t tiny = bits_of(float_of(rest) + 0.5f) - 0x3F000000u;
    uint32_t half = rest < 0x38800000u ? tiny : normal;
    half = rest >= 0x477FF000u ? 0x7C00u : half;
    half = rest > 0x7F800000u ? 0x7E00u | ((rest >> 13) & 0x3FFu) : half;
    return (uint16_t)(half | ((bits >> 16) & 0x8000u));
}

FOR_EVERY_PROCESSOR
static void widen_fp16_anywhere(const uint16_t *restrict stored, float *restrict wide,
                                size_t count) {
    for (size_t i = 0; i < count; i++) wide[i] = from_fp16(stored[i]);
}

FOR_EVERY_PROCESSOR
static void round_to_fp16_anywhere(const float *restrict wide, uint16_t *restrict stored,
                                   size_t count) {
    for (size_t i = 0; i < count; i++) stored[i] = to_fp16(wide[i]);
}

#if defined(CONVERTS_FP16)
__attribute__((target("avx2,f16c")))
static size_t widen_fp16_by_eights(const uint16_t *restrict stored, float *restrict wide,
                                   size_t count) {
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(wide + i, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(stored + i))));
    return i;
}

__attribute__((target("avx2,f16c")))
static size_t round_to_fp16_by_eights(const float *restrict wide, uint16_t *restrict stored,
                                      size_t count) {
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((void *)(stored + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(wide + i), _MM_FROUND_TO_NEAREST_INT));
    return i;
}
#define BY_EIGHTS(convert, from, to, count) \
    (__builtin_cpu_supports("avx2") ? convert(from, to, count) : 0)
#else
#define BY_EIGHTS(convert, from, to, count) 0
#endif

PUBLIC void widen_fp16(const uint16_t *restrict stored, float *restrict wide, size_t count) {
    size_t done = BY_EIGHTS(widen_fp16_by_eights, stored, wide, count);
    widen_fp16_anywhere(stored + done, wide + done, count - done);
}

PUBLIC void round_to_fp16(const float *restrict wide, uint16_t *restrict stored, size_t count) {
    size_t done = BY_EIGHTS(round_to_fp16_by_eights, wide, stored, count);
    round_to_fp16_anywhere(wide + done, stored + done, count - done);
}

/* What processors without such an instruction do, for tests on those that have it. */
PUBLIC void widen_fp16_plainly(const uint16_t *restrict stored, float *restrict wide,
                               size_t count) {
    widen_fp16_anywhere(stored, wide, count);
}

PUBLIC void round_to_fp16_plainly(const float *restrict wide, uint16_t *restrict stored,
                                  size_t count) {
    round_to_fp16_anywhere(wide, stored, count);
}

FOR_EVERY_PROCESSOR
static uint32_t marks_of_fp16(const uint16_t *halves, size_t count) {
    uint16_t marks = 0;
    for (size_t i = 0; i < count; i++) marks |= (uint16_t)((halves[i] & 0x7C00u) + 0x0400u);
    return marks & 0x8000u;
}

PUBLIC int step_along_fp16(STEP_ARGUMENTS(uint16_t)) {
    float sides[3][PIECE], moved[PIECE];
    uint32_t marks = 0;
    for (size_t start = 0; start < count; start += PIECE) {
        size_t size = count - start < PIECE ? count - start : PIECE;
        widen_fp16(anchor + start, sides[0], size);
        widen_fp16(minuend + start, sides[1], size);
        widen_fp16(subtrahend + start, sides[2], size);
        step_along_fp32(sides[0], sides[1], sides[2], first, second, third,
                        keep ? keep + start : NULL, moved, size);
        round_to_fp16(moved, result + start, size);
        marks |= marks_of_fp16(result + start, size);
    }
    return !marks;
}

/* The same step from fp32 to bf16, for sources that are stored as codes and scales. */
FOR_EVERY_PROCESSOR
static uint32_t marks_of_bf16(const uint16_t *halves, size_t count) {
    uint16_t marks = 0;
    for (size_t i = 0; i < count; i++) marks |= (uint16_t)((halves[i] & 0x7F80u) + 0x0080u);
    return marks & 0x8000u;
}

PUBLIC int step_along_fp32_to_bf16(const float *anchor, const float *minuend,
                                   const float *subtrahend, float first, float second, float third,
                                   const uint8_t *restrict keep, uint16_t *restrict result,
                                   size_t count) {
    float moved[PIECE];
    uint32_t marks = 0;
    for (size_t start = 0; start < count; start += PIECE) {
        size_t size = count - start < PIECE ? count - start : PIECE;
        step_along_fp32(anchor + start, minuend + start, subtrahend + start, first, second, third,
                        keep ? keep + start : NULL, moved, size);
        round_to_bf16(moved, result + start, size);
        marks |= marks_of_bf16(result + start, size);
    }
    return !marks;
}

/* What 8-bit codes stand for: values[code] * scale, rounded to fp32 once. */
FOR_EVERY_PROCESSOR
static void dequantise_piece(const uint8_t *restrict codes, const float *restrict values,
                             float scale, float *restrict wide, size_t count) {
    for (size_t i = 0; i < count; i++) wide[i] = values[codes[i]] * scale;
}

/* The codes are entries `begin` and on of a matrix with so many columns. Each block of
 * `block_rows` x `block_columns` entries has a scale of its own; `scale_columns` blocks are side by
 * side. */
PUBLIC void dequantise(const uint8_t *codes, const float *values, const float *scales, size_t begin,
                       size_t columns, size_t block_rows, size_t block_columns,
                       size_t scale_columns, float *wide, size_t count) {
    size_t row = begin / columns, column = begin % columns;
    while (count) {
        size_t block = column / block_columns, stop = (block + 1) * block_columns;
        size_t size = (stop < columns ? stop : columns) - column;
        size = size < count ? size : count;
        dequantise_piece(codes, values, scales[row / block_rows * scale_columns + block], wide, size);
        codes += size;
        wide += size;
        count -= size;
        column += size;
        if (column == columns) {
            column = 0;
            row++;
        }
    }
}

/* fp32 / scale to the nearest fp8 with 4 bits of exponent, ties to even; what is over its largest
 * number, 448, by more than half a step and what is not finite becomes NaN. */
FOR_EVERY_PROCESSOR
PUBLIC void quantise_to_fp8(const float *restrict wide, float scale, uint8_t *restrict codes,
                            size_t count) {
    for (size_t i = 0; i < count; i++) {
        uint32_t bits = bits_of(wide[i] / scale), rest = bits & 0x7FFFFFFFu;
        uint32_t normal = (rest - 0x3C000000u + 0x7FFFFu + ((rest >> 20) & 1u)) >> 20;
        uint32_t tiny = bits_of(float_of(rest) + 0x1p14f) - 0x46800000u;
        uint32_t is_tiny = 0u - (rest < 0x3C800000u), is_lost = 0u - (rest > 0x43E80000u);
        uint32_t code = ((tiny & is_tiny) | (normal & ~is_tiny) | is_lost) & 0x7Fu;
        codes[i] = (uint8_t)(code | ((bits >> 24) & 0x80u));
    }
}
