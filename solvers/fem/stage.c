/* One stage of a polynomial in L = M^-1 K(w), where K u = G^T diag(w) G u over pairs e = (i, j) of vertices, i < j, those
   of one i in a row. Adding both ends of a pair at once completes q_i = (K a)_i when row i has been passed. */
#include <stddef.h>
#include <stdint.h>

/* q = K(w) a; with g: g_e += c (a_i - a_j)(y_i - y_j); with inverse_mass: z = base + f a - t inverse_mass q. */
void stage(ptrdiff_t n, const int32_t *restrict start, const int32_t *restrict j, const double *restrict w,
           const double *restrict a, double *restrict q, double c, const double *restrict y, double *restrict g,
           const double *restrict inverse_mass, const double *base, double *z, double f, double t)
{
    for (ptrdiff_t i = 0; i < n; i++)
        q[i] = 0.0;
    for (ptrdiff_t i = 0; i < n; i++) {
        const double ai = a[i];
        double sum = q[i];
        if (g) {
            const double yi = y[i];
            for (int32_t e = start[i]; e < start[i + 1]; e++) {
                const double d = ai - a[j[e]], flux = w[e] * d;
                sum += flux;
                q[j[e]] -= flux;
                g[e] += c * d * (yi - y[j[e]]);
            }
        } else {
            for (int32_t e = start[i]; e < start[i + 1]; e++) {
                const double flux = w[e] * (ai - a[j[e]]);
                sum += flux;
                q[j[e]] -= flux;
            }
        }
        q[i] = sum;
        if (inverse_mass)
            z[i] = (base ? base[i] : 0.0) + f * ai - t * inverse_mass[i] * sum;
    }
}
