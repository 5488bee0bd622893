/* One stage of a polynomial in diffusion, K u = G^T diag(w) G u over pairs e = (i, j) of vertices, i < j, those of one i
   in a row, for LANES tumours at once: a state is (n, LANES), and every statement below is one vector instruction or two.
   A pair's weight is formed where it is used, w_e = sum_k share_ek theta_k, so nothing is stored per pair and tumour.
   Compiled with -DREAL=double or float and -DTERMS=K. */
#include <stddef.h>
#include <stdint.h>

#ifdef __AVX512F__
#define BYTES 64
#else
#define BYTES 32
#endif
#define LANES (BYTES / sizeof(REAL))
#define BLOCK 256 /* rows summed before they are added to the total: less rounding */

typedef REAL vec __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));

const int32_t lanes = LANES;

/* z = g base + f a - t M^-1 K a + h u, and transposed z = g base + f a - t K M^-1 a + h u, without base or u where they are
   NULL; with y (transposed only): total_k += c sum_e share_ek (G M^-1 a)_e (G y)_e. z may be base or u, but not a. q: mask + 1
   rows of scratch, a power of two beyond the largest j - i: row i of K a is complete when row i has been passed. */
static inline __attribute__((always_inline)) void run(
    const int transposed, const int products, ptrdiff_t n, const int32_t *restrict start, const int32_t *restrict second,
    const REAL *restrict share, const REAL *restrict inverse_mass, const vec *restrict theta, const vec *restrict a,
    const vec *base, vec *z, const vec *coefficients, const vec *u, vec *restrict q, ptrdiff_t mask,
    const vec *restrict y, vec *restrict total)
{
    const vec zero = {0}, g = coefficients[0], f = coefficients[1], t = coefficients[2], h = coefficients[3];
    vec th[TERMS];
    for (int k = 0; k < TERMS; k++)
        th[k] = theta[k];
    for (ptrdiff_t i = 0; i <= mask; i++)
        q[i] = zero;
    for (ptrdiff_t block = 0; block < n; block += BLOCK) {
        const ptrdiff_t end = block + BLOCK < n ? block + BLOCK : n;
        vec sums[TERMS];
        for (int k = 0; k < TERMS; k++)
            sums[k] = zero;
        for (ptrdiff_t i = block; i < end; i++) {
            const vec ai = a[i], bi = (transposed ? inverse_mass[i] : 1) * ai;
            const vec yi = products ? y[i] : zero;
            vec sum = q[i & mask];
            q[i & mask] = zero;
            for (int32_t e = start[i]; e < start[i + 1]; e++) {
                const ptrdiff_t j = second[e];
                const REAL *m = share + (ptrdiff_t)TERMS * e;
                vec w = m[0] * th[0];
                for (int k = 1; k < TERMS; k++)
                    w += m[k] * th[k];
                const vec d = bi - (transposed ? inverse_mass[j] : 1) * a[j];
                sum += w * d;
                q[j & mask] -= w * d;
                if (products) {
                    const vec p = d * (yi - y[j]);
                    for (int k = 0; k < TERMS; k++)
                        sums[k] += m[k] * p;
                }
            }
            vec out = f * ai - t * ((transposed ? 1 : inverse_mass[i]) * sum);
            if (base)
                out += g * base[i];
            if (u)
                out += h * u[i];
            z[i] = out;
        }
        if (products)
            for (int k = 0; k < TERMS; k++)
                total[k] += coefficients[4] * sums[k];
    }
}

void stage(int32_t transposed, ptrdiff_t n, const int32_t *start, const int32_t *second, const REAL *share,
           const REAL *inverse_mass, const vec *theta, const vec *a, const vec *base, vec *z, const vec *coefficients,
           const vec *u, vec *q, ptrdiff_t mask, const vec *y, vec *total)
{
    if (!transposed)
        run(0, 0, n, start, second, share, inverse_mass, theta, a, base, z, coefficients, u, q, mask, y, total);
    else if (!y)
        run(1, 0, n, start, second, share, inverse_mass, theta, a, base, z, coefficients, u, q, mask, y, total);
    else
        run(1, 1, n, start, second, share, inverse_mass, theta, a, base, z, coefficients, u, q, mask, y, total);
}

/* u e / (1 + u (e - 1)), growth = e - 1. */
void logistic(ptrdiff_t n, const vec *growth, const vec *u, vec *out)
{
    const vec g = *growth;
    for (ptrdiff_t i = 0; i < n; i++)
        out[i] = u[i] * (g + 1) / (u[i] * g + 1);
}

/* Its derivatives: out = cotangent e / (1 + u (e - 1))^2, total += sum of out u (1 - u). */
void logistic_adjoint(ptrdiff_t n, const vec *growth, const vec *u, const vec *cotangent, vec *out, vec *total)
{
    const vec zero = {0}, g = *growth;
    for (ptrdiff_t block = 0; block < n; block += BLOCK) {
        const ptrdiff_t end = block + BLOCK < n ? block + BLOCK : n;
        vec sum = zero;
        for (ptrdiff_t i = block; i < end; i++) {
            const vec r = u[i] * g + 1, s = cotangent[i] * (g + 1) / (r * r);
            sum += s * u[i] * (1 - u[i]);
            out[i] = s;
        }
        *total += sum;
    }
}
