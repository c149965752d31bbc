/* One pass over bf16 or fp32 where kernel.py takes many; the same bits.
 *
 * Built with the package where there is a C compiler, called through compiled.py. Every operation
 * rounds to fp32 on its own: build with -ffp-contract=off.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("avx2", "default")))
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

/* from_*: a stored entry to fp32, exactly. to_*: fp32 to the nearest entry, ties to even; returns
 * whether it is infinite or NaN, without comparisons, of which compilers make branches. */

static inline float from_bf16(uint16_t half) { return float_of((uint32_t)half << 16); }

/* NaN comes from bf16 here, so its low bits are zero and the sum does not run over. */
static inline uint32_t to_bf16(float value, uint16_t *half) {
    uint32_t bits = bits_of(value);
    bits = bits + 0x7FFFu + ((bits >> 16) & 1u);
    *half = (uint16_t)(bits >> 16);
    return ((bits & 0x7F800000u) + 0x800000u) >> 31;
}

static inline float from_fp32(float value) { return value; }

static inline uint32_t to_fp32(float value, float *result) {
    *result = value;
    return ((bits_of(value) & 0x7F800000u) + 0x800000u) >> 31;
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

/* Compared in 16 bits, of which a register holds most: values <= last is values < last + 1. */
FOR_EVERY_PROCESSOR
static void keep_up_to(const uint16_t *restrict values, uint16_t last, uint8_t *restrict keep,
                       size_t count) {
    for (size_t i = 0; i < count; i++) keep[i] = (uint8_t)(values[i] <= last);
}

/* Mask v1 of one block: 1 where an entry is kept, else 0. `state` is that of a seeded SFC64. */
PUBLIC void draw_keep(const uint64_t *state, uint32_t threshold, uint8_t *keep, size_t count) {
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

/* The same for STREAMS blocks of one size, each with its state, whose masks lie one behind the
 * other. A word waits for the one before it in its stream, but not for those of other streams. */
FOR_EVERY_PROCESSOR
PUBLIC void draw_keep_of_streams(const uint64_t *states, uint32_t threshold, uint8_t *keep,
                                 size_t count) {
#if defined(__GNUC__)
    lanes a, b, c, w;
    union {
        uint64_t words[STREAMS][TILE / 4];
        uint16_t values[STREAMS][TILE];
    } drawn;
    for (size_t s = 0; s < STREAMS; s++) {
        a[s] = states[4 * s];
        b[s] = states[4 * s + 1];
        c[s] = states[4 * s + 2];
        w[s] = states[4 * s + 3];
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
        draw_keep(states + 4 * s, threshold, keep + s * count, count);
#endif
}

/* result = anchor + third * (second * (first * (minuend - subtrahend))) where `keep` is 1, the
 * anchor where it is 0; without `keep` everywhere. Every operation is rounded to fp32, the result
 * once to what is stored. Returns whether all is finite, also what is dropped. */
#define STEP_ALONG(FORMAT, TYPE)                                                                    \
    FOR_EVERY_PROCESSOR                                                                             \
    PUBLIC int step_along_##FORMAT(const TYPE *anchor, const TYPE *minuend, const TYPE *subtrahend, \
                                   float first, float second, float third,                          \
                                   const uint8_t *restrict keep, TYPE *restrict result,             \
                                   size_t count) {                                                  \
        uint32_t is_bad = 0;                                                                        \
        for (size_t i = 0; i < count; i++) {                                                        \
            float difference = from_##FORMAT(minuend[i]) - from_##FORMAT(subtrahend[i]);            \
            float step = third * (second * (first * difference));                                   \
            float kept = keep ? step * (float)keep[i] : step;                                       \
            is_bad |= to_##FORMAT(from_##FORMAT(anchor[i]) + kept, &result[i]);                     \
        }                                                                                           \
        return !is_bad;                                                                             \
    }

STEP_ALONG(bf16, uint16_t)
STEP_ALONG(fp32, float)
