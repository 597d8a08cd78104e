/* The kernels of radiance fields and meshes for one CPU core; kernels/c_kernels.py says what each does and holds its arguments.

   Compiled without contraction to fused multiply-adds, so that points fall into the same cells as in plain torch. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 64 };         /* points that are worked on together, in vectors */
enum { MOST_FEATURES = 64 }; /* of a level; c_kernels.py asks for no more */

static inline int cell_of(float place, int last) {
    return place >= (float)last ? last : place > 0.0f ? (int)place : 0; /* a NaN, too, is given a cell */
}

int64_t sample(const float *origins, const float *directions, const float *offset, const float *near, const float *step,
               const uint8_t *binaries, int64_t num_rays, int num_samples, int resolution, float bound, float cells_a_unit,
               int32_t *ray, float *t, float *delta, int32_t *first) {
    int64_t slot = 0;
    first[0] = 0;
    for (int64_t r = 0; r < num_rays; r++) {
        const float *o = origins + 3 * r, *d = directions + 3 * r;
        const float shift = offset[r] * step[r];
        for (int begin = 0; step[r] > 0.0f && begin < num_samples; begin += BLOCK) {
            const int count = num_samples - begin < BLOCK ? num_samples - begin : BLOCK;
            float at[BLOCK];
            int index[BLOCK];
            for (int i = 0; i < count; i++) {
                at[i] = near[r] + (float)(begin + i) * step[r] + shift;
                const int x = cell_of((at[i] * d[0] + o[0] + bound) * cells_a_unit, resolution - 1);
                const int y = cell_of((at[i] * d[1] + o[1] + bound) * cells_a_unit, resolution - 1);
                const int z = cell_of((at[i] * d[2] + o[2] + bound) * cells_a_unit, resolution - 1);
                index[i] = (x * resolution + y) * resolution + z;
            }
            for (int i = 0; i < count; i++) {
                /* Written in any case, and kept by counting on: no branch to be foretold. */
                ray[slot] = (int32_t)r;
                t[slot] = at[i];
                delta[slot] = step[r];
                slot += binaries[index[i]] != 0;
            }
        }
        first[r + 1] = (int32_t)slot;
    }
    return slot;
}

void points(const float *origins, const float *directions, const int32_t *ray, const float *t, int64_t num_slots, float *out) {
    for (int64_t i = 0; i < num_slots; i++)
        for (int axis = 0; axis < 3; axis++)
            out[3 * i + axis] = origins[3 * ray[i] + axis] + t[i] * directions[3 * ray[i] + axis];
}

/* The first vertex of the cells of up to BLOCK points, and the weights of its eight corners, the last axis fastest. */
static inline void interpolation(const float *points, int num_points, int resolution, int64_t begin, int64_t *vertex,
                                 float weights[8][BLOCK]) {
    const float last = (float)(resolution - 1);
    float near[3][BLOCK], far[3][BLOCK];
    int cell[3][BLOCK];
    for (int axis = 0; axis < 3; axis++)
        for (int i = 0; i < num_points; i++) {
            const float whole = (points[3 * i + axis] + 1.0f) * 0.5f * last;
            const float place = whole < 0.0f ? 0.0f : whole > last ? last : whole; /* a NaN stays one */
            cell[axis][i] = cell_of(place, resolution - 2);
            far[axis][i] = place - (float)cell[axis][i];
            near[axis][i] = 1.0f - far[axis][i];
        }
    for (int i = 0; i < num_points; i++)
        vertex[i] = begin + (cell[0][i] * resolution + cell[1][i]) * resolution + cell[2][i];
    for (int corner = 0; corner < 8; corner++) {
        const float *x = (corner & 4 ? far : near)[0], *y = (corner & 2 ? far : near)[1], *z = (corner & 1 ? far : near)[2];
        for (int i = 0; i < num_points; i++) weights[corner][i] = x[i] * y[i] * z[i];
    }
}

/* From a cell's first vertex to each of its corners, in rows of the table. */
static inline void corner_offsets(int64_t resolution, int64_t offsets[8]) {
    for (int corner = 0; corner < 8; corner++)
        offsets[corner] = ((corner >> 2) * resolution + ((corner >> 1) & 1)) * resolution + (corner & 1);
}

static inline void encode_features(const float *points, const float *table, const int64_t *resolutions, int64_t num_points,
                                   int num_levels, const int num_features, float *out) {
    int64_t begin = 0, vertex[BLOCK], offsets[8];
    float weights[8][BLOCK];
    for (int level = 0; level < num_levels; level++) {
        const int64_t resolution = resolutions[level];
        corner_offsets(resolution, offsets);
        for (int64_t first = 0; first < num_points; first += BLOCK) {
            const int count = (int)(num_points - first < BLOCK ? num_points - first : BLOCK);
            interpolation(points + 3 * first, count, (int)resolution, begin, vertex, weights);
            for (int i = 0; i < count; i++) {
                float sum[MOST_FEATURES] = {0.0f};
                for (int corner = 0; corner < 8; corner++) {
                    const float *row = table + (vertex[i] + offsets[corner]) * num_features;
                    for (int f = 0; f < num_features; f++) sum[f] += weights[corner][i] * row[f];
                }
                memcpy(out + ((first + i) * num_levels + level) * num_features, sum, (size_t)num_features * sizeof(float));
            }
        }
        begin += resolution * resolution * resolution;
    }
}

void encode(const float *points, const float *table, const int64_t *resolutions, int64_t num_points, int num_levels,
            int num_features, float *out) {
    if (num_features == 4) /* a constant, of which one vector is made */
        encode_features(points, table, resolutions, num_points, num_levels, 4, out);
    else
        encode_features(points, table, resolutions, num_points, num_levels, num_features, out);
}

static inline void encode_back(const float *points, const float *cotangent, const int64_t *resolutions, int64_t num_points,
                               int num_levels, const int num_features, float *gradient) {
    int64_t begin = 0, vertex[BLOCK], offsets[8];
    float weights[8][BLOCK];
    for (int level = 0; level < num_levels; level++) {
        const int64_t resolution = resolutions[level];
        corner_offsets(resolution, offsets);
        for (int64_t first = 0; first < num_points; first += BLOCK) {
            const int count = (int)(num_points - first < BLOCK ? num_points - first : BLOCK);
            interpolation(points + 3 * first, count, (int)resolution, begin, vertex, weights);
            for (int i = 0; i < count; i++) {
                float pull[MOST_FEATURES];
                memcpy(pull, cotangent + ((first + i) * num_levels + level) * num_features, (size_t)num_features * sizeof(float));
                for (int corner = 0; corner < 8; corner++) {
                    float *row = gradient + (vertex[i] + offsets[corner]) * num_features, sum[MOST_FEATURES];
                    memcpy(sum, row, (size_t)num_features * sizeof(float)); /* one vector there and back */
                    for (int f = 0; f < num_features; f++) sum[f] += weights[corner][i] * pull[f];
                    memcpy(row, sum, (size_t)num_features * sizeof(float));
                }
            }
        }
        begin += resolution * resolution * resolution;
    }
}

void encode_backward(const float *points, const float *cotangent, const int64_t *resolutions, int64_t num_points, int num_levels,
                     int num_features, float *gradient) {
    if (num_features == 4)
        encode_back(points, cotangent, resolutions, num_points, num_levels, 4, gradient);
    else
        encode_back(points, cotangent, resolutions, num_points, num_levels, num_features, gradient);
}

void composite(const float *density, const float *color, const float *t, const float *delta, const int32_t *first, int64_t num_rays,
               int64_t num_slots, float *weights, float *transmittance, float *ray_color, float *opacity, float *depth) {
    for (int64_t r = 0; r < num_rays; r++) {
        float before = 0.0f, sums[5] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        for (int32_t i = first[r]; i < first[r + 1]; i++) {
            const float thickness = density[i] * delta[i], through = expf(-before), weight = through * -expm1f(-thickness);
            before += thickness;
            transmittance[i] = through;
            weights[i] = weight;
            for (int channel = 0; channel < 3; channel++) sums[channel] += weight * color[3 * i + channel];
            sums[3] += weight;
            sums[4] += weight * t[i];
        }
        memcpy(ray_color + 3 * r, sums, 3 * sizeof(float));
        opacity[r] = sums[3];
        depth[r] = sums[4];
    }
    const size_t num_left = (size_t)(num_slots - first[num_rays]) * sizeof(float);
    memset(weights + first[num_rays], 0, num_left);
    memset(transmittance + first[num_rays], 0, num_left);
}

void composite_backward(const float *density, const float *color, const float *t, const float *delta, const int32_t *first,
                        const float *weights, const float *transmittance, const float *for_weights, const float *for_color,
                        const float *for_opacity, const float *for_depth, int64_t num_rays, int64_t num_slots, float *of_density,
                        float *of_color) {
    for (int64_t r = 0; r < num_rays; r++) {
        float behind = 0.0f;
        const float *cotangent = for_color + 3 * r;
        for (int32_t i = first[r + 1] - 1; i >= first[r]; i--) {
            const float *c = color + 3 * i;
            const float of_c = cotangent[0] * c[0] + cotangent[1] * c[1] + cotangent[2] * c[2];
            const float pull = for_weights[i] + of_c + for_opacity[r] + for_depth[r] * t[i];
            of_density[i] = delta[i] * (pull * (transmittance[i] * expf(-(density[i] * delta[i]))) - behind);
            behind += pull * weights[i];
            for (int channel = 0; channel < 3; channel++) of_color[3 * i + channel] = weights[i] * cotangent[channel];
        }
    }
    memset(of_density + first[num_rays], 0, (size_t)(num_slots - first[num_rays]) * sizeof(float));
    memset(of_color + 3 * (int64_t)first[num_rays], 0, (size_t)(num_slots - first[num_rays]) * 3 * sizeof(float));
}

/* Where a corner's x / w or -y / w is, in pixels; whole numbers are their centres. */
static inline float place_of(float at, float w, float near, int size) {
    return (at / (w > near ? w : near) + 1.0f) * ((float)size * 0.5f) - 0.5f;
}

/* The first and the last pixel of a face along an axis, given where its corners are. */
static inline void span_of(const float at[3], float margin, int is_cut, int size, int *first, int *last) {
    const float low = fminf(fminf(at[0], at[1]), at[2]) - margin, high = fmaxf(fmaxf(at[0], at[1]), at[2]) + margin;
    *first = is_cut ? 0 : (int)ceilf(fminf(fmaxf(low, 0.0f), (float)size));
    *last = is_cut ? size - 1 : (int)floorf(fminf(fmaxf(high, -1.0f), (float)(size - 1)));
}

/* Up to BLOCK pixels of a row, which a face may hit. */
static inline void paint(const float x[3], const float y[3], const float w[3], float centre_y, int first, int count, int size,
                         float near, int32_t face, float *depth, int32_t *nearest) {
    float e0[BLOCK], e1[BLOCK], e2[BLOCK], v[3];
    for (int k = 0; k < 3; k++) v[k] = y[k] - centre_y * w[k];
    for (int i = 0; i < count; i++) {
        const float centre_x = (float)(2 * (first + i) + (1 - size)) / (float)size;
        const float u0 = x[0] - centre_x * w[0], u1 = x[1] - centre_x * w[1], u2 = x[2] - centre_x * w[2];
        e0[i] = u1 * v[2] - v[1] * u2;
        e1[i] = u2 * v[0] - v[2] * u0;
        e2[i] = u0 * v[1] - v[0] * u1;
    }
    for (int i = 0; i < count; i++) {
        const int is_front = (e0[i] >= 0.0f) & (e1[i] >= 0.0f) & (e2[i] >= 0.0f);
        const int is_back = (e0[i] <= 0.0f) & (e1[i] <= 0.0f) & (e2[i] <= 0.0f);
        const float total = e0[i] + e1[i] + e2[i];
        if (!(is_front | is_back) || total == 0.0f) continue;
        const float d = (e0[i] * w[0] + e1[i] * w[1] + e2[i] * w[2]) / total;
        if (d > near && d < depth[i]) { /* of equally near ones the first stays */
            depth[i] = d;
            nearest[i] = face;
        }
    }
}

/* depth: num_images size^2 infinities, nearest: as many -1. */
void nearest_faces(const float *xyw, const int64_t *faces, int64_t num_images, int64_t num_vertices, int64_t num_faces, int size,
                   float near, float margin, float *depth, int32_t *nearest) {
    for (int64_t image = 0; image < num_images; image++)
        for (int64_t face = 0; face < num_faces; face++) {
            float x[3], y[3], w[3], across[3], down[3], is_finite = 0.0f;
            int is_cut = 0, is_seen = 0, left, right, top, bottom;
            for (int k = 0; k < 3; k++) {
                const float *corner = xyw + (image * num_vertices + faces[3 * face + k]) * 3;
                x[k] = corner[0], y[k] = corner[1], w[k] = corner[2];
                is_finite += (x[k] - x[k]) + (y[k] - y[k]) + (w[k] - w[k]);
                is_cut |= w[k] <= near;
                is_seen |= w[k] > near;
                across[k] = place_of(x[k], w[k], near, size);
                down[k] = place_of(-y[k], w[k], near, size);
            }
            if (!is_seen || is_finite != 0.0f) continue;
            span_of(across, margin, is_cut, size, &left, &right);
            span_of(down, margin, is_cut, size, &top, &bottom);
            for (int row = top; row <= bottom; row++) {
                const int64_t at = (image * size + row) * size;
                const float centre_y = (float)((size - 1) - 2 * row) / (float)size;
                for (int begin = left; begin <= right; begin += BLOCK) {
                    const int count = right + 1 - begin < BLOCK ? right + 1 - begin : BLOCK;
                    paint(x, y, w, centre_y, begin, count, size, near, (int32_t)face, depth + at + begin, nearest + at + begin);
                }
            }
        }
}

typedef struct {
    float x[3], y[3], w[3], facing;
    int is_whole; /* before the camera */
} triangle;

static inline triangle triangle_of(const float *xyw, const int64_t *vertices, float near) {
    triangle t = {.is_whole = 1};
    for (int k = 0; k < 3; k++) {
        const float *corner = xyw + 3 * vertices[k];
        t.x[k] = corner[0], t.y[k] = corner[1], t.w[k] = corner[2];
        t.is_whole &= t.w[k] > near;
    }
    const float e0 = t.x[1] * t.y[2] - t.y[1] * t.x[2], e1 = t.x[2] * t.y[0] - t.y[2] * t.x[0];
    const float det = e0 * t.w[0] + e1 * t.w[1] + (t.x[0] * t.y[1] - t.y[0] * t.x[1]) * t.w[2];
    t.facing = det > 0.0f ? 1.0f : det < 0.0f ? -1.0f : 0.0f;
    return t;
}

/* Through which edge the way leads out of a face, -1 where it does not within a pixel; whether that edge is steep enough. */
static inline int way_out(const triangle *t, float centre_x, float centre_y, int is_down, float sign, int size, int *fits) {
    float u[3], v[3], along = -INFINITY;
    int leaving = -1;
    for (int k = 0; k < 3; k++) {
        const float x = t->x[k] - centre_x * t->w[k], y = t->y[k] - centre_y * t->w[k];
        u[k] = (is_down ? y : x) * sign, v[k] = is_down ? x : y;
    }
    for (int edge = 0; edge < 3; edge++) {
        const int i = (edge + 1) % 3, j = (edge + 2) % 3;
        if ((v[i] >= 0.0f) == (v[j] >= 0.0f)) continue;
        const float lengthwise = t->w[i] * u[j] - t->w[j] * u[i], wide = t->w[i] * v[j] - t->w[j] * v[i];
        const float place = (u[i] * v[j] - v[i] * u[j]) / (wide == 0.0f ? 1.0f : wide) * ((float)size * 0.5f);
        if (place > along) {
            along = place, leaving = edge;
            *fits = is_down ? fabsf(wide) > fabsf(lengthwise) : fabsf(wide) >= fabsf(lengthwise);
        }
    }
    return along <= 1.0f ? leaving : -1;
}

void crossing_edges(const float *xyw, const int64_t *faces, const int64_t *across, const uint8_t *is_turned, const int64_t *face,
                    const float *depth, int64_t num_images, int64_t num_vertices, int size, float near, int num_steps, int64_t *found) {
    const int64_t num_pixels = num_images * size * size;
    for (int64_t pair = 0; pair < 2 * num_pixels; pair++) {
        const int is_down = pair >= num_pixels;
        const int64_t pixel = pair - is_down * num_pixels, beside = pixel + (is_down ? size : 1);
        const int64_t image = pixel / ((int64_t)size * size);
        int row = (int)(pixel / size % size), column = (int)(pixel % size);
        found[pair] = -1;
        if ((is_down ? row : column) == size - 1 || face[pixel] == face[beside]) continue;
        const int is_other = face[pixel] < 0 || (face[beside] >= 0 && depth[beside] < depth[pixel]);
        int64_t at = is_other ? face[beside] : face[pixel];
        row += is_other & is_down, column += is_other & !is_down;
        const float centre_x = (float)(2 * column + (1 - size)) / (float)size;
        const float centre_y = (float)((size - 1) - 2 * row) / (float)size;
        const float *of_image = xyw + image * num_vertices * 3;
        triangle here = triangle_of(of_image, faces + 3 * at, near);
        for (int step = 0; step < num_steps && here.is_whole; step++) {
            int fits = 0;
            const int leaving = way_out(&here, centre_x, centre_y, is_down, is_other == is_down ? 1.0f : -1.0f, size, &fits);
            if (leaving < 0) break;
            const int64_t next = across[3 * at + leaving];
            triangle there = here;
            if (next >= 0) there = triangle_of(of_image, faces + 3 * next, near);
            if (next < 0 || here.facing * there.facing * (is_turned[3 * at + leaving] ? -1.0f : 1.0f) < 0.0f) {
                if (fits) found[pair] = 6 * at + 2 * leaving + is_other;
                break;
            }
            at = next;
            here = there;
        }
    }
}

/* From here on sums may be fused: no point's cell depends on them. */
#ifdef __clang__
#pragma STDC FP_CONTRACT ON
#else
#pragma GCC optimize("fp-contract=fast")
#endif

enum { LANES = 16, VECTORS = BLOCK / LANES, MOST_WIDTH = 256 };
typedef float vector __attribute__((vector_size(LANES * sizeof(float)))); /* the compiler cuts it into the machine's own */
typedef vector column[VECTORS];                                          /* of BLOCK points */

/* Turn up to BLOCK rows into columns, and fill up with zeros. */
static inline void columns(const float *rows, int num_rows, int width, column *out) {
    for (int k = 0; k < width; k++)
        for (int i = 0; i < BLOCK; i++) ((float *)out[k])[i] = i < num_rows ? rows[i * width + k] : 0.0f;
}

static inline void rows(const column *columns, int num_rows, int width, float *out) {
    for (int i = 0; i < num_rows; i++)
        for (int k = 0; k < width; k++) out[i * width + k] = ((const float *)columns[k])[i];
}

/* out = weights x + bias: weight (j, k) is at j stride_out + k stride_in. Two outputs at a time, their sums in registers. */
static inline void layer(const column *x, const float *weights, const float *bias, int num_in, int num_out, int stride_in,
                         int stride_out, column *out) {
    for (int j = 0; j < num_out; j += 2) {
        const int other = j + 1 < num_out ? j + 1 : j;
        const float *of_one = weights + j * stride_out, *of_other = weights + other * stride_out;
        column one, two;
        for (int v = 0; v < VECTORS; v++) {
            one[v] = (vector){0.0f} + (bias ? bias[j] : 0.0f);
            two[v] = (vector){0.0f} + (bias ? bias[other] : 0.0f);
        }
        for (int k = 0; k < num_in; k++) {
            const float a = of_one[k * stride_in], b = of_other[k * stride_in];
            for (int v = 0; v < VECTORS; v++) {
                one[v] += a * x[k][v];
                two[v] += b * x[k][v];
            }
        }
        for (int v = 0; v < VECTORS; v++) {
            out[j][v] = one[v];
            out[other][v] = two[v];
        }
    }
}

static inline void relu(column *x, int width) {
    for (int j = 0; j < width; j++)
        for (int i = 0; i < BLOCK; i++) ((float *)x[j])[i] = ((float *)x[j])[i] < 0.0f ? 0.0f : ((float *)x[j])[i];
}

/* sums[j num_b + k] += a[j] b[k], by lanes, which are added up at the end. */
static inline void products(const column *a, const column *b, int num_a, int num_b, vector *sums) {
    for (int j = 0; j < num_a; j++)
        for (int k = 0; k < num_b; k++) {
            vector sum = sums[j * num_b + k];
            for (int v = 0; v < VECTORS; v++) sum += a[j][v] * b[k][v];
            sums[j * num_b + k] = sum;
        }
}

static inline void add_up(const vector *sums, int count, float *out) {
    for (int n = 0; n < count; n++) {
        out[n] = 0.0f;
        for (int lane = 0; lane < LANES; lane++) out[n] += sums[n][lane];
    }
}

void two_layers(const float *x, const float *hidden, const float *hidden_bias, const float *output, const float *output_bias,
                int64_t num_points, int num_in, int num_hidden, int num_out, float *out) {
    static _Thread_local column in[MOST_WIDTH], h[MOST_WIDTH], y[MOST_WIDTH];
    for (int64_t first = 0; first < num_points; first += BLOCK) {
        const int count = (int)(num_points - first < BLOCK ? num_points - first : BLOCK);
        columns(x + first * num_in, count, num_in, in);
        layer(in, hidden, hidden_bias, num_in, num_hidden, 1, num_in, h);
        relu(h, num_hidden);
        layer(h, output, output_bias, num_hidden, num_out, 1, num_hidden, y);
        rows(y, count, num_out, out + first * num_out);
    }
}

/* scratch: num_hidden num_in + num_out num_hidden + num_hidden + num_out vectors of zeros. */
void two_layers_backward(const float *x, const float *hidden, const float *hidden_bias, const float *output, const float *cotangent,
                         int64_t num_points, int num_in, int num_hidden, int num_out, vector *scratch, float *of_x, float *of_hidden,
                         float *of_hidden_bias, float *of_output, float *of_output_bias) {
    static _Thread_local column in[MOST_WIDTH], h[MOST_WIDTH], of_h[MOST_WIDTH], of_y[MOST_WIDTH];
    vector *hidden_sums = scratch, *output_sums = hidden_sums + num_hidden * num_in;
    vector *hidden_bias_sums = output_sums + num_out * num_hidden, *output_bias_sums = hidden_bias_sums + num_hidden;
    column ones;
    for (int v = 0; v < VECTORS; v++) ones[v] = (vector){0.0f} + 1.0f;
    for (int64_t first = 0; first < num_points; first += BLOCK) {
        const int count = (int)(num_points - first < BLOCK ? num_points - first : BLOCK);
        columns(x + first * num_in, count, num_in, in);
        columns(cotangent + first * num_out, count, num_out, of_y);
        layer(in, hidden, hidden_bias, num_in, num_hidden, 1, num_in, h);
        relu(h, num_hidden);
        layer(of_y, output, NULL, num_out, num_hidden, num_hidden, 1, of_h);
        for (int j = 0; j < num_hidden; j++)
            for (int i = 0; i < BLOCK; i++)
                ((float *)of_h[j])[i] = ((float *)h[j])[i] <= 0.0f ? 0.0f : ((float *)of_h[j])[i];
        products(of_y, h, num_out, num_hidden, output_sums);
        products(of_y, &ones, num_out, 1, output_bias_sums);
        products(of_h, in, num_hidden, num_in, hidden_sums);
        products(of_h, &ones, num_hidden, 1, hidden_bias_sums);
        layer(of_h, hidden, NULL, num_hidden, num_in, num_in, 1, in);
        rows(in, count, num_in, of_x + first * num_in);
    }
    add_up(hidden_sums, num_hidden * num_in, of_hidden);
    add_up(output_sums, num_out * num_hidden, of_output);
    add_up(hidden_bias_sums, num_hidden, of_hidden_bias);
    add_up(output_bias_sums, num_out, of_output_bias);
}
