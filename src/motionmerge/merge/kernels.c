/* One pass over bf16 where kernel.py takes many; the same bits.
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
#define EXPONENT 0x7F80u

static inline float widened(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To the nearest bf16, ties to even. What is not finite keeps an exponent of ones: NaN comes from
 * bf16 here, so its low bits are zero and the sum does not run over. */
static inline uint16_t narrowed(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

FOR_EVERY_PROCESSOR
static void keep_below(const uint16_t *restrict values, uint32_t threshold, uint8_t *restrict keep,
                       size_t count) {
    for (size_t i = 0; i < count; i++) keep[i] = values[i] < threshold;
}

/* Mask v1 of one block: 1 where an entry is kept, else 0. `state` is that of a seeded SFC64. */
PUBLIC void draw_keep(const uint64_t *state, uint32_t threshold, uint8_t *keep, size_t count) {
    uint64_t a = state[0], b = state[1], c = state[2], w = state[3];
    union {
        uint64_t words[TILE / 4];
        uint16_t values[TILE];
    } drawn;
    for (size_t start = 0; start < count; start += TILE) {
        size_t size = count - start < TILE ? count - start : TILE;
        for (size_t i = 0; i < (size + 3) / 4; i++) {
            uint64_t out = a + b + w++;
            a = b ^ (b >> 11);
            b = c + (c << 3);
            c = ((c << 24) | (c >> 40)) + out;
            drawn.words[i] = out;
        }
        keep_below(drawn.values, threshold, keep + start, size);
    }
}

/* result = anchor + factor * (scale * (minuend - subtrahend)) where `keep` is 1, the anchor where it
 * is 0; without `keep` everywhere. Returns whether all are finite: NaN and infinity show also where
 * they are dropped. */
FOR_EVERY_PROCESSOR
PUBLIC int step_along(const uint16_t *anchor, const uint16_t *minuend, const uint16_t *subtrahend,
                      float scale, float factor, const uint8_t *restrict keep,
                      uint16_t *restrict result, size_t count) {
    uint32_t largest = 0;
    for (size_t i = 0; i < count; i++) {
        float step = factor * (scale * (widened(minuend[i]) - widened(subtrahend[i])));
        float kept = keep ? step * (float)keep[i] : step;
        uint16_t half = narrowed(widened(anchor[i]) + kept);
        uint32_t exponent = half & EXPONENT;
        result[i] = half;
        largest = exponent > largest ? exponent : largest;
    }
    return largest < EXPONENT;
}
