/* Loops of the core that read and write memory once, where PyTorch's operators do many times.
 * Arrays are contiguous; those that a loop adds to begin at zero.
 */
#include <stdint.h>
#include <math.h>
#include <string.h>

#define BLOCK 64
#define ROWS 256
#define LEAK 0.01f

/* 2^n exp(r) for |n| <= 126 and |r| <= ln2/2. */
static inline float exp_reduced(float r, float n) {
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } power = { ((int32_t)n + 127) << 23 };
    return p * power.f;
}

/* exp(x) for -87 <= x <= 0, to 2 ulp. */
static inline float exp_negative(float x) {
    float n = floorf(x * 1.44269504f + 0.5f);
    return exp_reduced(x - n * 0.693359375f + n * 2.12194440e-4f, n);
}

/* The normal distribution's cdf and density at z (Abramowitz and Stegun 7.1.26, 1.5e-7). */
static inline void normal(float z, float *cdf, float *density) {
    float half = 0.5f * z * z;
    float e = exp_negative(-(half < 87.0f ? half : 87.0f));
    float a = fabsf(z);
    float t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * a);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    float tail = 0.5f * p * t * e;
    *cdf = z >= 0 ? 1.0f - tail : tail;
    *density = 0.39894228f * e;
}

static inline uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
}

static inline float number(uint64_t place, uint64_t shift) {
    return (float)(int32_t)(mix(mix(place) + shift) >> 40) * 0x1p-24f;
}

/* U[0, 1) at the places row * width + column, of 24 bits; see hashed.py. */
void hashed(int threads, int64_t n, int64_t width, uint64_t key, uint64_t shift, const int64_t *rows,
            float *out) {
    #pragma omp parallel for num_threads(threads)
    for (int64_t j = 0; j < n; j++) {
        uint64_t first = key + (uint64_t)(rows[j] * width);
        for (int64_t c = 0; c < width; c++) out[j * width + c] = number(first + c, shift);
    }
}

typedef uint16_t bf16;

static inline float of_bf16(bf16 x) {
    union { uint32_t i; float f; } u = { (uint32_t)x << 16 };
    return u.f;
}

/* To the nearest, ties to even. */
static inline bf16 to_bf16(float x) {
    union { float f; uint32_t i; } u = { x };
    return (x == x ? u.i + 0x7fff + ((u.i >> 16) & 1) : 0x7fc00000) >> 16;
}

static inline float same(float x) { return x; }

/* One row of out = acts (m - m_d), where m = ci + (1 - ci) r, and the same with its gradients: those of
 * ci and r are added to what is there, that of m_d is returned.
 */
#define MASKED_ROW(T, LOAD, STORE)                                                                 \
    static void masked_row_##T(int64_t C, float m_d, const float *restrict r,                      \
                               const T *restrict acts, const float *restrict ci,                   \
                               T *restrict out) {                                                  \
        for (int64_t c = 0; c < C; c++)                                                            \
            out[c] = STORE(LOAD(acts[c]) * (r[c] + ci[c] * (1 - r[c]) - m_d));                     \
    }                                                                                              \
    static float masked_row_gradients_##T(int64_t C, float m_d, const float *restrict r,           \
                                          const T *restrict acts, const float *restrict ci,        \
                                          const T *restrict grad, T *restrict gacts,               \
                                          float *restrict gci, float *restrict gr,                 \
                                          T *restrict out) {                                       \
        float total = 0;                                                                           \
        for (int64_t c = 0; c < C; c++) {                                                          \
            float g = LOAD(grad[c]), act = LOAD(acts[c]), of_mask = g * act;                       \
            float difference = r[c] + ci[c] * (1 - r[c]) - m_d;                                    \
            gacts[c] = STORE(g * difference);                                                      \
            out[c] = STORE(act * difference);                                                      \
            gci[c] += of_mask * (1 - r[c]);                                                        \
            gr[c] += of_mask * (1 - ci[c]);                                                        \
            total -= of_mask;                                                                      \
        }                                                                                          \
        return total;                                                                              \
    }

MASKED_ROW(float, same, same)
MASKED_ROW(bf16, of_bf16, to_bf16)

static inline void draw(int64_t width, uint64_t first, uint64_t shift, float *r) {
    for (int64_t c = 0; c < width; c++) r[c] = number(first + c, shift);
}

/* Row j has the causal importances of row rows[j]. r has width = C + 1 numbers, of which the last is
 * m_d, or C without a delta: those of places[j], or if `shared` for all rows those in `source`.
 * acts, out and their gradients are bf16 if `half`, else float.
 */
void masked_forward(int threads, int64_t n, int64_t n_own, int64_t C, int64_t width, uint64_t key,
                    uint64_t shift, int64_t half, int64_t shared, const int64_t *rows,
                    const int64_t *places, const void *acts, const float *ci, const float *source,
                    void *out, float *m_d) {
    #pragma omp parallel for num_threads(threads)
    for (int64_t j = 0; j < n; j++) {
        float drawn[width];
        if (!shared) draw(width, key + (uint64_t)(places[j] * width), shift, drawn);
        const float *r = shared ? source : drawn, *importance = ci + rows[j] * C;
        int64_t at = j * C;
        m_d[j] = width > C ? r[C] : 0;
        if (half) masked_row_bf16(C, m_d[j], r, (bf16 *)acts + at, importance, (bf16 *)out + at);
        else masked_row_float(C, m_d[j], r, (float *)acts + at, importance, (float *)out + at);
    }
}

/* From n_own on rows give ci no gradient: they only fill up, and might come twice. That of a shared
 * source is in parts, each of some rows, so that sums do not depend on the number of threads. Where
 * nobody wants `out` once more, it is not kept.
 */
void masked_backward(int threads, int64_t n, int64_t n_own, int64_t n_part, int64_t wanted, int64_t C,
                     int64_t width, uint64_t key, uint64_t shift, int64_t half, int64_t shared,
                     const int64_t *rows, const int64_t *places, const void *acts, const float *ci,
                     const float *source, const void *grad, void *gacts, float *gci, float *gsource,
                     void *out) {
    #pragma omp parallel for num_threads(threads)
    for (int64_t part = 0; part < (n + n_part - 1) / n_part; part++) {
        float drawn[width], unused[C], unused_r[width], unused_out[C];
        float *gr = shared ? gsource + part * width : unused_r;
        memset(unused, 0, sizeof unused);
        memset(unused_r, 0, sizeof unused_r);
        for (int64_t j = part * n_part; j < n && j < (part + 1) * n_part; j++) {
            if (!shared) draw(width, key + (uint64_t)(places[j] * width), shift, drawn);
            const float *r = shared ? source : drawn, *importance = ci + rows[j] * C;
            float d = width > C ? r[C] : 0, *gimportance = j < n_own ? gci + rows[j] * C : unused, total;
            int64_t at = j * C;
            if (half) total = masked_row_gradients_bf16(
                C, d, r, (bf16 *)acts + at, importance, (bf16 *)grad + at, (bf16 *)gacts + at,
                gimportance, gr, wanted ? (bf16 *)out + at : (bf16 *)unused_out);
            else total = masked_row_gradients_float(
                C, d, r, (float *)acts + at, importance, (float *)grad + at, (float *)gacts + at,
                gimportance, gr, wanted ? (float *)out + at : unused_out);
            if (width > C) gr[C] += total;
        }
    }
}

/* C scalar MLPs side by side, x -> sum_k w2_k gelu(w1_k x + b1_k) + b2, whose hidden activations
 * never leave the cache. x, out, grad, gx are (n, C); w1, b1, w2 and their gradients (C, h).
 */
void mlps_forward(int threads, int64_t n, int64_t C, int64_t h, const float *x, const float *w1,
                  const float *b1, const float *w2, const float *b2, float *out) {
    #pragma omp parallel for num_threads(threads)
    for (int64_t j0 = 0; j0 < n; j0 += BLOCK) {
        int m = n - j0 < BLOCK ? n - j0 : BLOCK;
        for (int64_t c = 0; c < C; c++) {
            float xs[BLOCK], sum[BLOCK], cdf, density;
            for (int j = 0; j < m; j++) xs[j] = x[(j0 + j) * C + c];
            for (int j = 0; j < m; j++) sum[j] = b2[c];
            for (int64_t k = c * h; k < (c + 1) * h; k++)
                for (int j = 0; j < m; j++) {
                    float z = w1[k] * xs[j] + b1[k];
                    normal(z, &cdf, &density);
                    sum[j] += w2[k] * z * cdf;
                }
            for (int j = 0; j < m; j++) out[(j0 + j) * C + c] = sum[j];
        }
    }
}

/* Each thread has its own c throughout, which a static schedule without waiting gives it. */
void mlps_backward(int threads, int64_t n, int64_t C, int64_t h, const float *x, const float *w1,
                   const float *b1, const float *w2, const float *b2, const float *grad, float *gx,
                   float *gw1, float *gb1, float *gw2, float *gb2) {
    #pragma omp parallel num_threads(threads)
    for (int64_t j0 = 0; j0 < n; j0 += BLOCK) {
        int m = n - j0 < BLOCK ? n - j0 : BLOCK;
        #pragma omp for schedule(static) nowait
        for (int64_t c = 0; c < C; c++) {
            float xs[BLOCK], gs[BLOCK], sum[BLOCK] = {0}, cdf, density, total = 0;
            for (int j = 0; j < m; j++) xs[j] = x[(j0 + j) * C + c];
            for (int j = 0; j < m; j++) gs[j] = grad[(j0 + j) * C + c];
            for (int64_t k = c * h; k < (c + 1) * h; k++) {
                float s1 = 0, sb = 0, s2 = 0;
                for (int j = 0; j < m; j++) {
                    float z = w1[k] * xs[j] + b1[k];
                    normal(z, &cdf, &density);
                    float gz = gs[j] * w2[k] * (cdf + z * density);
                    s1 += gz * xs[j];
                    sb += gz;
                    s2 += gs[j] * z * cdf;
                    sum[j] += gz * w1[k];
                }
                gw1[k] += s1;
                gb1[k] += sb;
                gw2[k] += s2;
            }
            for (int j = 0; j < m; j++) total += gs[j];
            gb2[c] += total;
            for (int j = 0; j < m; j++) gx[(j0 + j) * C + c] = sum[j];
        }
    }
}

static inline float get(const void *x, int64_t i, int64_t half) {
    return half ? of_bf16(((bf16 *)x)[i]) : ((float *)x)[i];
}

static inline void put(void *x, int64_t i, int64_t half, float value) {
    if (half) ((bf16 *)x)[i] = to_bf16(value);
    else ((float *)x)[i] = value;
}

/* NaN stays NaN. */
static inline float clamped(float x) { return x <= 0 ? 0 : x >= 1 ? 1 : x; }

void lower_leaky_hard_forward(int threads, int64_t n, int64_t half, const void *x, float *lower) {
    #pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i++) lower[i] = clamped(get(x, i, half));
}

/* Up to 0 the gradient leaks, but only where descent would raise x. */
void lower_leaky_hard_backward(int threads, int64_t n, int64_t half, const void *x,
                               const float *grad, void *gx) {
    #pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        float v = get(x, i, half), leaked = LEAK * (grad[i] < 0 ? grad[i] : 0);
        put(gx, i, half, v <= 0 ? leaked : v <= 1 ? grad[i] : 0);
    }
}

/* x^p for normal x > 0, to 5e-7 for p <= 3: 2^(p log2 x). What is not finite stays. */
static inline float power(float x, float p) {
    union { float f; int32_t i; } u = { x };
    int32_t e = (u.i - 0x3f3504f3) >> 23;  /* the mantissa will lie in [sqrt(1/2), sqrt(2)) */
    u.i -= e << 23;
    float s = (u.f - 1.0f) / (u.f + 1.0f), s2 = s * s;
    float q = 1.0f / 9;
    q = q * s2 + 1.0f / 7;
    q = q * s2 + 1.0f / 5;
    q = q * s2 + 1.0f / 3;
    float of_mantissa = p * ((q * s2 * s + s) * 2.88539008f), y = p * (float)e + of_mantissa;
    float n = floorf((y < -126 ? -126 : y > 126 ? 126 : y) + 0.5f);
    float rest = fmaf(p, (float)e, -n) + of_mantissa;  /* y - n has lost the last digits of y */
    rest = rest < -1 ? -1 : rest > 1 ? 1 : rest;
    return x < INFINITY ? exp_reduced(rest * 0.69314718f, n) : x;
}

/* Clamped up to x = 1, then rising with slope LEAK. At both corners the gradient passes: at 0 is where
 * ci_fns start.
 */
static inline float upper_leaky_hard(float x) { return clamped(x) + LEAK * (x > 1 ? x - 1 : 0); }

static inline float upper_slope(float x) { return x > 1 ? LEAK : x >= 0 ? 1 : 0; }

/* out_c = sum over j of times_j (upper_leaky_hard(x_jc) + eps)^p. A thread has its own c, so that sums
 * do not depend on the number of threads.
 */
void power_sums_forward(int threads, int64_t n, int64_t C, int64_t half, const void *x,
                        const float *times, const float *p_and_eps, float *out) {
    float p = p_and_eps[0], eps = p_and_eps[1];
    #pragma omp parallel for num_threads(threads)
    for (int64_t c0 = 0; c0 < C; c0 += BLOCK) {
        int m = C - c0 < BLOCK ? C - c0 : BLOCK;
        double total[BLOCK] = {0};
        for (int64_t j0 = 0; j0 < n; j0 += ROWS) {
            float sum[BLOCK] = {0};
            for (int64_t j = j0; j < n && j < j0 + ROWS; j++)
                for (int c = 0; c < m; c++)
                    sum[c] += times[j] * power(upper_leaky_hard(get(x, j * C + c0 + c, half)) + eps, p);
            for (int c = 0; c < m; c++) total[c] += sum[c];
        }
        for (int c = 0; c < m; c++) out[c0 + c] = total[c];
    }
}

void power_sums_backward(int threads, int64_t n, int64_t C, int64_t half, const void *x,
                         const float *times, const float *p_and_eps, const float *grad, void *gx,
                         float *gtimes, float *gp_and_eps) {
    float p = p_and_eps[0], eps = p_and_eps[1];
    #pragma omp parallel for num_threads(threads)
    for (int64_t j = 0; j < n; j++) {
        float slope = times[j] * p;
        for (int64_t c = 0; c < C; c++) {
            float v = get(x, j * C + c, half), of_power = power(upper_leaky_hard(v) + eps, p - 1);
            put(gx, j * C + c, half, slope * grad[c] * of_power * upper_slope(v));
        }
    }
}
