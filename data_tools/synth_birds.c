/* synth_birds.c - draws a data set of small bird pictures in the Waterbirds layout.  No download, no input.
 *
 *     cc -O2 synth_birds.c -o synth_birds -lm && ./synth_birds --out birds
 *
 * Two kinds of birds (landbird, waterbird) stand or swim on two kinds of places (land, water).  The place is easy to
 * see, but for the mist that lies over a third of the pictures.  The kind takes more learning: every measure of a bird
 * (beak, neck, tail, feet, body) is drawn from one of two distributions that overlap, and pose, size, colour, light and
 * what stands in front are the same for both kinds.  In the training split the place agrees with the kind for 95 % of
 * the pictures, in validation and test for half of them; a model that reads the place is right on most of the training
 * pictures and has to learn the rest by heart.
 *
 * Every picture is a pure function of (seed, split, number): the counts of the other splits change nothing.
 */
#include "tool.h"

#define PI 3.14159265f

enum { LAND, WATER };                /* of kinds and of places alike */

/* ================================================================================================================
 * Small mathematics: draws, noise, distances
 * ============================================================================================================= */

typedef struct draws {
    uint64_t key, stream, next;
} draws;

typedef struct point {
    float x, y;
} point;

typedef struct colour {
    float r, g, b;
} colour;

static float minf(float a, float b) { return a < b ? a : b; }
static float maxf(float a, float b) { return a > b ? a : b; }
static float clampf(float x, float low, float high) { return minf(maxf(x, low), high); }
static float mixf(float a, float b, float t) { return a + (b - a) * t; }

static float smoothf(float low, float high, float x)
{
    float t = clampf((x - low) / (high - low), 0.0f, 1.0f);
    return t * t * (3.0f - 2.0f * t);
}

static float between(draws *d, float low, float high)
{
    return mixf(low, high, spm_random_uniform(d->key, d->stream, d->next++));
}

static float normal(draws *d)
{
    return spm_random_normal(d->key, d->stream, d->next++);
}

static point between_points(draws *d, point low, point high)
{
    point p;
    p.x = between(d, low.x, high.x);
    p.y = between(d, low.y, high.y);
    return p;
}

static int below(draws *d, int n)
{
    return (int)spm_random_below(d->key, d->stream, d->next++, (uint32_t)n);
}

static int chance(draws *d, float probability)
{
    return between(d, 0.0f, 1.0f) < probability;
}

static draws draws_of(uint64_t key, uint64_t stream)
{
    draws d;
    d.key = key;
    d.stream = stream;
    d.next = 0;
    return d;
}

static point point_of(float x, float y)
{
    point p;
    p.x = x;
    p.y = y;
    return p;
}

/* p + t * q */
static point along(point p, point q, float t) { return point_of(p.x + t * q.x, p.y + t * q.y); }
static float dot(point a, point b) { return a.x * b.x + a.y * b.y; }
static float length_of(point p) { return sqrtf(dot(p, p)); }
static point direction(float angle) { return point_of(cosf(angle), sinf(angle)); }

static colour rgb(float r, float g, float b)
{
    colour c;
    c.r = r;
    c.g = g;
    c.b = b;
    return c;
}

static colour blend(colour a, colour b, float t)
{
    return rgb(mixf(a.r, b.r, t), mixf(a.g, b.g, t), mixf(a.b, b.b, t));
}

static colour dim(colour a, float t) { return rgb(a.r * t, a.g * t, a.b * t); }

/* Hue in turns, saturation and value in [0, 1]. */
static colour hsv(float hue, float saturation, float value)
{
    float h = 6.0f * (hue - floorf(hue)), r, g, b;
    r = clampf(fabsf(h - 3.0f) - 1.0f, 0.0f, 1.0f);
    g = clampf(2.0f - fabsf(h - 2.0f), 0.0f, 1.0f);
    b = clampf(2.0f - fabsf(h - 4.0f), 0.0f, 1.0f);
    return rgb(value * mixf(1.0f, r, saturation), value * mixf(1.0f, g, saturation), value * mixf(1.0f, b, saturation));
}

/* A colour with hue, saturation and value between two bounds each.  (One draw a statement, here and everywhere: the
 * order in which arguments are evaluated is the compiler's choice.) */
static colour tone(draws *d, float h0, float h1, float s0, float s1, float v0, float v1)
{
    float hue = between(d, h0, h1), saturation = between(d, s0, s1), value = between(d, v0, v1);
    return hsv(hue, saturation, value);
}

/* How much of a pixel a shape covers whose edge is `pixels` away (negative: inside); `wider` grows the shape. */
static float cover(float pixels, float wider) { return clampf(0.5f + wider - pixels, 0.0f, 1.0f); }

/* A value in [0, 1) for a lattice point: cheap mixing is enough for textures. */
static float lattice(uint32_t key, int x, int y)
{
    uint32_t h = key ^ ((uint32_t)x * 0x8DA6B343u) ^ ((uint32_t)y * 0xD8163841u);
    h ^= h >> 15;
    h *= 0x2C1B3C6Du;
    h ^= h >> 12;
    h *= 0x297A2D39u;
    h ^= h >> 15;
    return (float)(h >> 8) * (1.0f / 16777216.0f);
}

static float noise(uint32_t key, float x, float y)
{
    float fx = floorf(x), fy = floorf(y), u = x - fx, v = y - fy;
    int ix = (int)fx, iy = (int)fy;
    u = u * u * (3.0f - 2.0f * u);
    v = v * v * (3.0f - 2.0f * v);
    return mixf(mixf(lattice(key, ix, iy), lattice(key, ix + 1, iy), u),
                mixf(lattice(key, ix, iy + 1), lattice(key, ix + 1, iy + 1), u), v);
}

/* Octaves of noise, in [0, 1] with mean 1/2. */
static float cloud(uint32_t key, float x, float y, int octaves)
{
    float sum = 0.0f, weight = 0.5f, total = 0.0f;
    int i;
    for (i = 0; i < octaves; i++) {
        sum += weight * noise(key + (uint32_t)i * 77u, x, y);
        total += weight;
        weight *= 0.5f;
        x *= 2.03f;
        y *= 2.03f;
    }
    return sum / total;
}

/* Signed distances, negative inside. */
static float ellipse_distance(point p, float a, float b)
{
    float k0 = sqrtf(p.x * p.x / (a * a) + p.y * p.y / (b * b));
    float k1 = sqrtf(p.x * p.x / (a * a * a * a) + p.y * p.y / (b * b * b * b));
    return k1 > 1e-6f ? k0 * (k0 - 1.0f) / k1 : -minf(a, b);
}

/* A stroke from a to b whose radius goes from ra to rb. */
static float stroke_distance(point p, point a, point b, float ra, float rb)
{
    point ab = along(b, a, -1.0f), ap = along(p, a, -1.0f);
    float t = clampf(dot(ap, ab) / maxf(dot(ab, ab), 1e-9f), 0.0f, 1.0f);
    return length_of(along(ap, ab, -t)) - mixf(ra, rb, t);
}

static float triangle_distance(point p, point a, point b, point c)
{
    point v[3];
    float best = 1e9f;
    int i, inside = 0;
    v[0] = a;
    v[1] = b;
    v[2] = c;
    for (i = 0; i < 3; i++) {
        point from = v[i], to = v[(i + 1) % 3], edge = along(to, from, -1.0f), q = along(p, from, -1.0f);
        float t = clampf(dot(q, edge) / maxf(dot(edge, edge), 1e-9f), 0.0f, 1.0f);
        best = minf(best, length_of(along(q, edge, -t)));
        inside += edge.x * q.y - edge.y * q.x > 0.0f ? 1 : -1;
    }
    return inside == 3 || inside == -3 ? -best : best;
}

/* The union of two shapes with a fillet of about k, so that a neck grows out of a body. */
static float join(float a, float b, float k)
{
    float h = maxf(k - fabsf(a - b), 0.0f) / k;
    return minf(a, b) - h * h * k * 0.25f;
}

/* ================================================================================================================
 * The canvas: size x size pixels that stand for the unit square, y down
 * ============================================================================================================= */

typedef struct canvas {
    colour *pixels;
    int size;
} canvas;

static void paint(canvas *to, int x, int y, colour c, float coverage)
{
    colour *pixel;
    if (x < 0 || y < 0 || x >= to->size || y >= to->size) return;
    pixel = to->pixels + (size_t)y * (size_t)to->size + (size_t)x;
    *pixel = blend(*pixel, c, clampf(coverage, 0.0f, 1.0f));
}

static point pixel_centre(const canvas *to, int x, int y)
{
    return point_of(((float)x + 0.5f) / (float)to->size, ((float)y + 0.5f) / (float)to->size);
}

/* An antialiased stroke; radii in units of the picture. */
static void paint_stroke(canvas *to, point a, point b, float ra, float rb, colour c, float opacity)
{
    float n = (float)to->size, r = maxf(ra, rb) + 1.0f / n;
    int x0 = (int)floorf((minf(a.x, b.x) - r) * n), x1 = (int)ceilf((maxf(a.x, b.x) + r) * n);
    int y0 = (int)floorf((minf(a.y, b.y) - r) * n), y1 = (int)ceilf((maxf(a.y, b.y) + r) * n), x, y;
    for (y = y0 < 0 ? 0 : y0; y < y1 && y < to->size; y++)
        for (x = x0 < 0 ? 0 : x0; x < x1 && x < to->size; x++)
            paint(to, x, y, c, opacity * cover(n * stroke_distance(pixel_centre(to, x, y), a, b, ra, rb), 0.0f));
}

static void paint_ellipse(canvas *to, point at, float a, float b, colour c, float opacity, float softness)
{
    float n = (float)to->size;
    int x0 = (int)floorf((at.x - a - softness) * n), x1 = (int)ceilf((at.x + a + softness) * n);
    int y0 = (int)floorf((at.y - b - softness) * n), y1 = (int)ceilf((at.y + b + softness) * n), x, y;
    softness = maxf(softness, 1.0f / n);
    for (y = y0 < 0 ? 0 : y0; y < y1 && y < to->size; y++)
        for (x = x0 < 0 ? 0 : x0; x < x1 && x < to->size; x++) {
            float distance = ellipse_distance(along(pixel_centre(to, x, y), at, -1.0f), a, b);
            paint(to, x, y, c, opacity * cover(distance / softness, 0.0f));
        }
}

/* ================================================================================================================
 * Places
 * ============================================================================================================= */

typedef enum scene_type { MEADOW, FOREST, FIELD, BAMBOO, SEA, LAKE, OPEN_WATER, POND, SCENE_TYPES } scene_type;

static const char scene_names[SCENE_TYPES][12] = {"meadow", "forest", "field", "bamboo",
                                                  "sea", "lake", "open_water", "pond"};

typedef struct scene {
    scene_type type;
    float horizon;               /* y where the ground or the water begins; <= 0: none to be seen */
    colour sky_top, sky_low;
    colour ground, ground_dark;  /* or water */
    colour growth;               /* trees, stalks, reeds */
    uint32_t key;                /* of its noise */
    float grain;                 /* of its texture */
    float mist;                  /* 0 clear, 1 nothing but mist: there the place is hard to tell */
} scene;

static scene scene_draw(draws *d, int place)
{
    scene s;
    float hour = between(d, 0.0f, 1.0f); /* day, haze, evening */
    s.type = (scene_type)((place == WATER ? SEA : MEADOW) + below(d, 4));
    s.key = (uint32_t)below(d, 0x7FFFFFFF);
    s.grain = between(d, 0.8f, 1.3f);
    s.horizon = between(d, 0.12f, 0.46f);
    s.mist = chance(d, 0.31f) ? between(d, 0.75f, 0.98f) : maxf(between(d, -0.3f, 0.3f), 0.0f);
    if (s.type == OPEN_WATER || (s.type == POND && chance(d, 0.5f))) s.horizon = -0.15f;
    if (hour < 0.6f) {
        s.sky_top = tone(d, 0.54f, 0.62f, 0.25f, 0.6f, 0.75f, 0.95f);
        s.sky_low = tone(d, 0.50f, 0.58f, 0.05f, 0.2f, 0.88f, 1.0f);
    } else if (hour < 0.82f) {
        s.sky_top = tone(d, 0.5f, 0.65f, 0.02f, 0.15f, 0.65f, 0.85f);
        s.sky_low = tone(d, 0.1f, 0.6f, 0.0f, 0.1f, 0.8f, 0.93f);
    } else {
        s.sky_top = tone(d, 0.58f, 0.85f, 0.2f, 0.45f, 0.55f, 0.85f);
        s.sky_low = tone(d, 0.03f, 0.12f, 0.35f, 0.65f, 0.85f, 1.0f);
    }
    switch (s.type) {
    case MEADOW: s.ground = tone(d, 0.17f, 0.34f, 0.4f, 0.7f, 0.45f, 0.75f); break;
    case FOREST: s.ground = tone(d, 0.05f, 0.2f, 0.3f, 0.6f, 0.3f, 0.55f); break;
    case FIELD: s.ground = tone(d, 0.04f, 0.14f, 0.25f, 0.6f, 0.5f, 0.8f); break;
    case BAMBOO: s.ground = tone(d, 0.1f, 0.25f, 0.35f, 0.6f, 0.35f, 0.55f); break;
    case SEA: s.ground = tone(d, 0.48f, 0.62f, 0.3f, 0.7f, 0.45f, 0.75f); break;
    case LAKE: s.ground = tone(d, 0.42f, 0.6f, 0.2f, 0.5f, 0.4f, 0.7f); break;
    case OPEN_WATER: s.ground = tone(d, 0.45f, 0.65f, 0.25f, 0.65f, 0.4f, 0.75f); break;
    default: s.ground = tone(d, 0.2f, 0.5f, 0.2f, 0.45f, 0.35f, 0.6f); break;
    }
    if (s.type >= SEA) s.ground = blend(s.ground, s.sky_low, between(d, 0.1f, 0.35f)); /* water shows the sky */
    s.ground_dark = dim(s.ground, between(d, 0.5f, 0.7f));
    s.growth = s.type == BAMBOO ? tone(d, 0.16f, 0.32f, 0.35f, 0.65f, 0.4f, 0.7f)
             : s.type == FOREST ? tone(d, 0.04f, 0.1f, 0.2f, 0.5f, 0.2f, 0.4f)
                                : tone(d, 0.15f, 0.4f, 0.25f, 0.6f, 0.22f, 0.45f);
    return s;
}

/* How dark the water is at a point below the horizon: long flat ripples that grow towards the viewer. */
static float ripples(const scene *s, point p, float depth)
{
    float near = 1.0f / (depth + 0.22f), row = 7.0f * logf(depth + 0.1f) * s->grain;
    float wave = cloud(s->key + 11u, p.x * 2.4f * near + 0.5f * row, row * 2.2f, 3);
    float stripe = 0.5f + 0.5f * sinf(row * 6.0f + 9.0f * noise(s->key + 5u, p.x * 3.0f * near, row));
    return clampf(0.65f * wave + 0.35f * stripe, 0.0f, 1.0f);
}

static colour scene_at(const scene *s, point p, float soft)
{
    float depth = (p.y - s->horizon) / (1.0f - s->horizon); /* 0 at the horizon, 1 at the viewer's feet */
    colour c;
    if (depth < 0.0f) {
        float white = smoothf(0.52f, 0.8f, cloud(s->key + 3u, p.x * 3.0f, p.y * 7.0f, 3));
        c = blend(s->sky_top, s->sky_low, clampf(p.y / maxf(s->horizon, 0.05f), 0.0f, 1.0f));
        c = blend(c, rgb(1.0f, 1.0f, 1.0f), 0.6f * white);
    } else if (s->type >= SEA) {
        float wave = ripples(s, p, depth);
        c = blend(s->ground, s->sky_low, 0.45f * (1.0f - depth));
        c = blend(c, s->ground_dark, 0.85f * smoothf(0.3f, 0.75f, wave));
        c = blend(c, rgb(0.97f, 0.98f, 1.0f), 0.55f * smoothf(0.36f, 0.22f, wave));
    } else {
        float near = 1.0f / (depth + 0.35f);
        float lumps = cloud(s->key + 7u, p.x * 7.0f * near * s->grain, 9.0f * logf(depth + 0.2f), 4);
        c = blend(s->ground, s->ground_dark, smoothf(0.3f, 0.72f, lumps));
        c = blend(c, dim(s->ground, 1.2f), 0.4f * smoothf(0.6f, 0.75f, noise(s->key + 9u, p.x * 31.0f, p.y * 31.0f)));
    }
    /* what stands on the horizon: hills, a line of trees, a far shore, a wall of leaves */
    if (s->type == MEADOW || s->type == LAKE || s->type == FIELD || s->type == POND) {
        float height = (s->type == FIELD ? 0.10f : 0.16f) * cloud(s->key + 21u, p.x * 5.0f, 0.5f, 4) - 0.02f;
        float inside = smoothf(s->horizon - height - soft, s->horizon - height + soft, p.y)
                     * smoothf(s->horizon + 3.0f * soft, s->horizon + soft, p.y);
        colour far = blend(s->growth, s->sky_low, s->type == FIELD ? 0.45f : 0.2f);
        c = blend(c, dim(far, 0.7f + 0.6f * noise(s->key + 23u, p.x * 40.0f, p.y * 40.0f)), inside);
        if (s->type >= SEA && depth > 0.0f) /* its mirror image, broken by the ripples */
            c = blend(c, far, 0.5f * smoothf(height * 1.4f + 0.02f, 0.0f, p.y - s->horizon));
    } else if (s->type == FOREST || s->type == BAMBOO) {
        float leaves = cloud(s->key + 25u, p.x * 9.0f, p.y * 9.0f, 3);
        colour wall = s->type == BAMBOO ? dim(s->growth, 0.55f) : blend(hsv(0.27f, 0.45f, 0.3f), s->growth, 0.4f);
        wall = blend(dim(wall, 0.6f), blend(dim(wall, 1.5f), s->sky_low, 0.15f), smoothf(0.35f, 0.7f, leaves));
        c = blend(c, wall, smoothf(s->horizon + 0.035f, s->horizon + 0.005f, p.y));
    }
    return c;
}

/* A blade of grass or a reed; `sway` leans it. */
static void paint_blade(canvas *to, point foot, float height, float sway, float width, colour c)
{
    point middle = point_of(foot.x + 0.35f * sway, foot.y - 0.55f * height);
    point tip = point_of(foot.x + sway, foot.y - height);
    paint_stroke(to, foot, middle, width, 0.8f * width, c, 0.9f);
    paint_stroke(to, middle, tip, 0.8f * width, 0.15f * width, c, 0.9f);
}

static void scene_paint(canvas *to, const scene *s, draws *d)
{
    float soft = 1.0f / (float)to->size;
    int x, y, i, n;
    for (y = 0; y < to->size; y++)
        for (x = 0; x < to->size; x++)
            to->pixels[(size_t)y * (size_t)to->size + (size_t)x] = scene_at(s, pixel_centre(to, x, y), soft);
    switch (s->type) {
    case FOREST:
    case BAMBOO:
        n = s->type == FOREST ? 3 + below(d, 5) : 8 + below(d, 8);
        for (i = 0; i < n; i++) {
            float at = between(d, -0.05f, 1.05f), lean = between(d, -0.05f, 0.05f);
            float width = s->type == FOREST ? between(d, 0.012f, 0.055f) : between(d, 0.008f, 0.018f);
            point foot = point_of(at, s->horizon + between(d, 0.0f, 0.1f) + width), top = point_of(at + lean, -0.1f);
            colour c = dim(s->growth, between(d, 0.7f, 1.35f));
            paint_stroke(to, foot, top, width, 0.75f * width, c, 1.0f);
            foot.x += 0.45f * width; /* its side in the shade */
            top.x += 0.4f * width;
            paint_stroke(to, foot, top, 0.4f * width, 0.35f * width, dim(c, 0.65f), 0.8f);
        }
        break;
    case FIELD:
        for (i = 0, n = 6 + below(d, 14); i < n; i++) {
            point at = between_points(d, point_of(0.0f, s->horizon + 0.05f), point_of(1.0f, 1.0f));
            float r = between(d, 0.008f, 0.03f) * (at.y + 0.2f);
            colour c = dim(blend(s->ground, rgb(0.6f, 0.6f, 0.6f), 0.6f), between(d, 0.7f, 1.2f));
            point under = point_of(at.x, at.y + 0.4f * r);
            paint_ellipse(to, under, 1.2f * r, 0.7f * r, dim(s->ground_dark, 0.7f), 0.7f, 0.0f);
            paint_ellipse(to, at, r, 0.7f * r, c, 1.0f, 0.0f);
        }
        break;
    case POND:
        for (i = 0, n = below(d, 7); i < n; i++) { /* lily pads */
            point at = between_points(d, point_of(0.0f, maxf(s->horizon, 0.0f) + 0.08f), point_of(1.0f, 1.0f));
            float r = between(d, 0.03f, 0.07f) * (at.y + 0.2f);
            paint_ellipse(to, at, r, 0.4f * r, tone(d, 0.28f, 0.32f, 0.45f, 0.55f, 0.35f, 0.6f), 1.0f, 0.0f);
        }
        break;
    default:
        break;
    }
    if (s->type == MEADOW || s->type == BAMBOO || s->type == FOREST)
        for (i = 0, n = s->type == MEADOW ? 70 : 22; i < n; i++) {
            float depth = between(d, 0.02f, 1.0f), size = 0.25f + 0.75f * depth;
            float height = between(d, 0.05f, 0.11f), sway = between(d, -0.04f, 0.04f), light = between(d, 0.7f, 1.3f);
            point foot = point_of(between(d, -0.05f, 1.05f), mixf(s->horizon, 1.02f, depth));
            colour c = dim(blend(s->ground, s->growth, between(d, 0.0f, 0.5f)), light);
            paint_blade(to, foot, size * height, size * sway, 0.008f * size, c);
        }
    if (s->mist > 0.0f)
        for (y = 0; y < to->size; y++)
            for (x = 0; x < to->size; x++) {
                point p = pixel_centre(to, x, y);
                float bank = 0.9f + 0.16f * cloud(s->key + 31u, p.x * 2.5f, p.y * 4.0f, 2);
                paint(to, x, y, dim(blend(s->sky_low, rgb(0.85f, 0.86f, 0.88f), 0.6f), bank), s->mist);
            }
}

/* ================================================================================================================
 * Birds
 * ============================================================================================================= */

/* In bird units: the body's half length is 1, x forward, y up, the body's centre in (0, 0). */
typedef struct bird {
    /* what the kind has a say in */
    float body_height, tilt, neck, head, beak, beak_base, beak_tip, tail, leg;
    int webbed;                  /* feet */
    /* what it has not */
    float neck_angle, neck_bend, beak_angle, tail_angle, tail_spread, wing_lift;
    float x, y, scale;           /* of the body's centre and half length in the picture */
    int flip;                    /* 1: looks to the left */
    int swims;                   /* 1: the water stands at `waterline`, legs are not to be seen */
    float waterline;
    colour back, belly, cap, beak_colour, leg_colour, wing;
    float belly_edge, speckle;
    int has_cap, has_bar;
    uint32_t key;
    /* derived points */
    point hip[2], foot[2], neck_joint[5], head_at, beak_end, tail_at[2], wing_at[2];
} bird;

/* A measure that is near `land` for landbirds and near `water` for waterbirds, in so far as `separation` says; both
 * kinds spread by `spread` half-distances and overlap. */
static float measure(draws *d, int kind, float land, float water, float separation, float spread)
{
    float side = (kind == WATER ? separation : -separation) + spread * normal(d);
    return 0.5f * (land + water) + 0.5f * (water - land) * clampf(side, -2.0f, 2.0f);
}

static colour plumage(draws *d)
{
    switch (below(d, 7)) {
    case 0: return tone(d, 0.05f, 0.11f, 0.3f, 0.65f, 0.3f, 0.65f);   /* brown */
    case 1: return tone(d, 0.0f, 1.0f, 0.0f, 0.08f, 0.75f, 0.97f);    /* white */
    case 2: return tone(d, 0.55f, 0.75f, 0.0f, 0.3f, 0.1f, 0.25f);    /* black */
    case 3: return tone(d, 0.5f, 0.65f, 0.02f, 0.15f, 0.4f, 0.65f);   /* gray */
    case 4: return tone(d, 0.55f, 0.66f, 0.4f, 0.75f, 0.45f, 0.8f);   /* blue */
    case 5: return tone(d, 0.98f, 1.06f, 0.55f, 0.85f, 0.55f, 0.85f); /* red, rust */
    default: return tone(d, 0.11f, 0.2f, 0.4f, 0.8f, 0.6f, 0.9f);     /* yellow, olive */
    }
}

static bird bird_draw(draws *d, int kind, int place, float difficulty)
{
    bird b;
    point axis, across, shoulder, up, side;
    float separation = 1.8f - 1.2f * difficulty, spread = 0.45f, low, high, left, right, wide, tall, top, height;
    int i;
    b.body_height = measure(d, kind, 0.66f, 0.54f, separation, 1.0f);
    b.tilt = measure(d, kind, 0.38f, 0.12f, separation, 1.2f);
    b.neck = measure(d, kind, 0.12f, 0.62f, separation, 0.9f);
    b.head = measure(d, kind, 0.40f, 0.31f, separation, 0.8f);
    b.beak = measure(d, kind, 0.26f, 0.62f, separation, spread);
    b.beak_base = measure(d, kind, 0.15f, 0.12f, separation, 1.0f);
    b.beak_tip = measure(d, kind, 0.015f, 0.07f, separation, spread);
    b.tail = measure(d, kind, 0.95f, 0.40f, separation, spread);
    b.leg = maxf(measure(d, kind, 0.55f, 0.50f, separation, 3.0f), 0.3f);
    b.webbed = measure(d, kind, 0.0f, 1.0f, separation, spread) > 0.5f;

    b.neck_angle = between(d, 0.9f, 1.6f);
    b.neck_bend = between(d, -0.25f, 0.25f);
    b.beak_angle = between(d, -0.5f, 0.3f);
    b.tail_angle = between(d, -0.35f, 0.4f);
    b.tail_spread = between(d, 0.08f, 0.22f);
    b.wing_lift = chance(d, 0.2f) ? between(d, 0.3f, 1.0f) : between(d, -0.15f, 0.1f);
    b.flip = below(d, 2);
    b.swims = place == WATER && chance(d, 0.55f);
    b.waterline = -b.body_height * between(d, 0.35f, 0.75f);
    b.back = plumage(d);
    b.belly = chance(d, 0.6f) ? blend(b.back, rgb(0.95f, 0.93f, 0.88f), between(d, 0.4f, 0.9f)) : plumage(d);
    b.cap = plumage(d);
    b.wing = chance(d, 0.6f) ? dim(b.back, between(d, 0.5f, 0.8f)) : blend(b.back, plumage(d), 0.7f);
    b.has_cap = chance(d, 0.45f);
    b.has_bar = chance(d, 0.4f);
    b.belly_edge = between(d, -0.35f, 0.15f);
    b.speckle = chance(d, 0.3f) ? between(d, 0.2f, 0.5f) : 0.0f;
    b.beak_colour = chance(d, 0.6f) ? tone(d, 0.04f, 0.14f, 0.6f, 0.95f, 0.65f, 1.0f)
                                    : tone(d, 0.05f, 0.6f, 0.05f, 0.3f, 0.15f, 0.4f);
    b.leg_colour = chance(d, 0.6f) ? tone(d, 0.02f, 0.13f, 0.5f, 0.9f, 0.6f, 0.95f)
                                   : tone(d, 0.05f, 0.6f, 0.05f, 0.3f, 0.15f, 0.35f);
    b.key = (uint32_t)below(d, 0x7FFFFFFF);

    axis = direction(b.tilt);
    across = point_of(-axis.y, axis.x);
    shoulder = along(along(point_of(0.0f, 0.0f), axis, 0.62f), across, 0.3f * b.body_height);
    up = direction(b.neck_angle);
    side = point_of(up.y, -up.x);
    for (i = 0; i < 5; i++) {
        float t = (float)i / 4.0f;
        point straight = along(shoulder, up, t * (b.neck + 0.28f));
        b.neck_joint[i] = along(straight, side, b.neck_bend * 4.0f * t * (1.0f - t) * b.neck);
    }
    b.head_at = along(along(b.neck_joint[4], up, 0.1f), point_of(1.0f, 0.0f), 0.12f);
    b.beak_end = along(b.head_at, direction(b.beak_angle), 0.85f * b.head + b.beak);
    b.tail_at[0] = along(point_of(0.0f, 0.0f), axis, -0.75f);
    b.tail_at[1] = along(b.tail_at[0], direction(b.tilt + PI + b.tail_angle), 0.25f + b.tail);
    b.wing_at[0] = along(along(point_of(0.0f, 0.0f), axis, 0.42f), across, 0.1f * b.body_height);
    b.wing_at[1] = along(b.wing_at[0], axis, -1.2f * cosf(b.wing_lift));
    b.wing_at[1] = along(b.wing_at[1], across, 1.2f * sinf(b.wing_lift) + 0.05f);
    for (i = 0; i < 2; i++) {
        float at = i ? 0.16f : -0.12f, step = between(d, -0.14f, 0.14f);
        b.hip[i] = point_of(at, -0.7f * b.body_height);
        b.foot[i] = point_of(at + step, -b.body_height - b.leg + 0.08f * (float)i);
    }

    /* as large as it likes, but inside the picture */
    low = b.swims ? b.waterline : minf(b.foot[0].y, b.foot[1].y);
    high = maxf(b.head_at.y + b.head, b.wing_at[1].y + 0.2f);
    left = minf(b.tail_at[1].x, -1.0f);
    right = maxf(b.beak_end.x, 1.0f);
    b.scale = minf(between(d, 0.17f, 0.26f), minf(0.92f / (high - low), 0.92f / (right - left)));
    wide = b.scale * (right - left);
    tall = b.scale * (high - low);
    top = maxf(0.04f, 0.3f - 0.3f * tall);
    b.x = between(d, 0.04f, 0.96f - wide) + b.scale * (b.flip ? right : -left);
    height = between(d, 0.15f, 1.0f);
    b.y = mixf(top, 0.94f - tall, height) + b.scale * high;
    return b;
}

static point bird_to_picture(const bird *b, point p)
{
    return point_of(b->x + (b->flip ? -b->scale : b->scale) * p.x, b->y - b->scale * p.y);
}

static float bird_silhouette(const bird *b, point p)
{
    float c = cosf(b->tilt), s = sinf(b->tilt);
    float d = ellipse_distance(point_of(c * p.x + s * p.y, -s * p.x + c * p.y), 1.0f, b->body_height);
    float thin = 0.62f * b->head, thick = 0.34f;
    int i;
    d = join(d, stroke_distance(p, b->tail_at[0], b->tail_at[1], 0.2f, b->tail_spread), 0.25f);
    for (i = 0; i < 4; i++)
        d = join(d, stroke_distance(p, b->neck_joint[i], b->neck_joint[i + 1], mixf(thick, thin, 0.25f * (float)i),
                                    mixf(thick, thin, 0.25f * (float)(i + 1))), 0.18f);
    return join(d, length_of(along(p, b->head_at, -1.0f)) - b->head, 0.12f);
}

static float beak_distance(const bird *b, point p)
{
    point root = along(b->head_at, along(b->beak_end, b->head_at, -1.0f), 0.25f);
    return stroke_distance(p, root, b->beak_end, b->beak_base, b->beak_tip);
}

static float feet_distance(const bird *b, point p)
{
    float best = 1e9f;
    int i;
    for (i = 0; i < 2; i++) {
        point foot = b->foot[i];
        best = minf(best, stroke_distance(p, b->hip[i], foot, 0.07f, 0.045f));
        if (b->webbed) {
            point ankle = point_of(foot.x, foot.y + 0.1f);
            point toe = point_of(foot.x + 0.42f, foot.y - 0.08f), heel = point_of(foot.x - 0.06f, foot.y - 0.12f);
            best = minf(best, triangle_distance(p, ankle, toe, heel) - 0.02f);
        } else {
            point toe = point_of(foot.x + 0.34f, foot.y - 0.05f), heel = point_of(foot.x - 0.14f, foot.y - 0.05f);
            best = minf(best, stroke_distance(p, foot, toe, 0.04f, 0.02f));
            best = minf(best, stroke_distance(p, foot, heel, 0.04f, 0.02f));
        }
    }
    return best;
}

static colour plumage_at(const bird *b, point p)
{
    float c = cosf(b->tilt), s = sinf(b->tilt), height = (-s * p.x + c * p.y) / b->body_height;
    colour shade = blend(b->belly, b->back, smoothf(b->belly_edge - 0.18f, b->belly_edge + 0.18f, height));
    if (b->has_cap)
        shade = blend(shade, b->cap, smoothf(1.15f * b->head, 0.95f * b->head, length_of(along(p, b->head_at, -1.0f))));
    if (b->speckle > 0.0f)
        shade = dim(shade, 1.0f - b->speckle * smoothf(0.55f, 0.75f, noise(b->key, p.x * 7.0f, p.y * 7.0f)));
    return dim(shade, clampf(0.96f + 0.22f * p.y, 0.72f, 1.15f));
}

/* One pixel of the bird at `p` (bird units): legs, silhouette with a thin outline, beak, eye, wing, from back to front.
 * `unit` is the number of pixels in a bird unit; every edge is antialiased by its distance. */
static void bird_paint_at(canvas *to, int x, int y, const bird *b, point p, float unit)
{
    point eye = along(b->head_at, point_of(0.3f, 0.22f), b->head), glint = along(eye, point_of(0.03f, 0.03f), 1.0f);
    colour ink = rgb(0.08f, 0.07f, 0.08f), white = rgb(1.0f, 1.0f, 1.0f);
    float above = b->swims ? cover(unit * (b->waterline - p.y), 0.0f) : 1.0f; /* how much of it is out of the water */
    float body, beak, feet, wing;
    if (above <= 0.0f) return;
    if (!b->swims) {
        feet = feet_distance(b, p);
        paint(to, x, y, dim(b->leg_colour, 0.5f), 0.5f * cover(unit * feet, 0.4f));
        paint(to, x, y, b->leg_colour, cover(unit * feet, 0.0f));
    }
    body = bird_silhouette(b, p);
    beak = beak_distance(b, p);
    paint(to, x, y, ink, 0.55f * above * cover(unit * minf(body, beak), 0.6f));
    paint(to, x, y, dim(b->beak_colour, p.y < b->head_at.y - 0.02f ? 0.85f : 1.0f), above * cover(unit * beak, 0.0f));
    if (unit * body < 0.5f) {
        paint(to, x, y, plumage_at(b, p), above * cover(unit * body, 0.0f));
        paint(to, x, y, ink, above * cover(unit * (length_of(along(p, eye, -1.0f)) - 0.085f), 0.0f));
        paint(to, x, y, white, 0.8f * above * cover(unit * (length_of(along(p, glint, -1.0f)) - 0.03f), 0.0f));
    }
    wing = stroke_distance(p, b->wing_at[0], b->wing_at[1], 0.55f * b->body_height, 0.06f);
    paint(to, x, y, dim(b->wing, 0.5f), 0.5f * above * cover(unit * wing, 0.4f));
    paint(to, x, y, dim(b->wing, clampf(0.95f + 0.25f * p.y, 0.75f, 1.2f)), above * cover(unit * wing, 0.0f));
    if (b->has_bar)
        paint(to, x, y, rgb(0.95f, 0.94f, 0.9f), 0.7f * above * cover(unit * (fabsf(wing + 0.13f) - 0.045f), 0.0f));
}

static void bird_paint(canvas *to, const bird *b)
{
    float n = (float)to->size;
    int x0 = (int)((b->x - 3.2f * b->scale) * n), x1 = (int)((b->x + 3.2f * b->scale) * n);
    int y0 = (int)((b->y - 2.6f * b->scale) * n), y1 = (int)((b->y + 2.6f * b->scale) * n), x, y;
    for (y = y0 < 0 ? 0 : y0; y <= y1 && y < to->size; y++)
        for (x = x0 < 0 ? 0 : x0; x <= x1 && x < to->size; x++) {
            point at = pixel_centre(to, x, y);
            point p = point_of((at.x - b->x) / (b->flip ? -b->scale : b->scale), (b->y - at.y) / b->scale);
            bird_paint_at(to, x, y, b, p, n * b->scale);
        }
}

/* ================================================================================================================
 * A picture
 * ============================================================================================================= */

/* A stone or a branch under a bird that stands, whatever its kind. */
static void perch_paint(canvas *to, const bird *b, const scene *s, draws *d)
{
    point left = bird_to_picture(b, b->foot[0]), right = bird_to_picture(b, b->foot[1]);
    point foot = point_of(0.5f * (left.x + right.x), left.y);
    float r = b->scale * between(d, 0.7f, 1.3f), slope = between(d, -0.04f, 0.04f);
    if (chance(d, 0.5f)) {
        colour stone = tone(d, 0.05f, 0.6f, 0.02f, 0.2f, 0.35f, 0.65f), shade = dim(s->ground_dark, 0.6f);
        paint_ellipse(to, point_of(foot.x, foot.y + 0.5f * r), 1.25f * r, 0.45f * r, shade, 0.6f, 0.03f);
        paint_ellipse(to, point_of(foot.x, foot.y + 0.4f * r), 1.1f * r, 0.42f * r, dim(stone, 0.75f), 1.0f, 0.0f);
        paint_ellipse(to, point_of(foot.x - 0.1f * r, foot.y + 0.3f * r), 0.9f * r, 0.28f * r, stone, 1.0f, 0.02f);
    } else {
        colour wood = tone(d, 0.05f, 0.1f, 0.3f, 0.55f, 0.25f, 0.45f);
        left = point_of(foot.x - 2.2f * r, foot.y + 0.025f - slope);
        right = point_of(foot.x + 2.2f * r, foot.y + 0.025f + slope);
        paint_stroke(to, left, right, 0.028f, 0.018f, dim(wood, 0.7f), 1.0f);
        left.y -= 0.007f;
        right.y -= 0.007f;
        paint_stroke(to, left, right, 0.016f, 0.01f, dim(wood, 1.2f), 1.0f);
    }
}

/* What lies between the viewer and the bird. */
static void front_paint(canvas *to, const bird *b, const scene *s, draws *d)
{
    point foot = bird_to_picture(b, point_of(0.0f, b->swims ? b->waterline : -b->body_height - b->leg));
    int i, n;
    if (b->swims) { /* rings on the water */
        for (i = 0; i < 5; i++) {
            float half = b->scale * between(d, 0.5f, 1.3f);
            float x = foot.x + between(d, -0.03f, 0.03f), y = foot.y + 0.012f + 0.02f * (float)i;
            colour c = i % 2 ? s->ground_dark : blend(s->sky_low, s->ground, 0.3f);
            paint_stroke(to, point_of(x - half, y), point_of(x + half, y), 0.005f, 0.003f, c, 0.6f);
        }
    }
    if (chance(d, 0.4f)) { /* grass or reeds */
        float centre = foot.x + between(d, -0.2f, 0.2f), reach = between(d, 0.05f, 0.25f);
        colour green = blend(s->ground, s->growth, 0.4f);
        if (s->type >= SEA) green = tone(d, 0.14f, 0.3f, 0.3f, 0.55f, 0.3f, 0.55f);
        for (i = 0, n = 5 + below(d, 10); i < n; i++) {
            point low = point_of(centre - reach, foot.y + 0.03f), high = point_of(centre + reach, foot.y + 0.1f);
            point root = between_points(d, low, high);
            float height = between(d, 0.08f, 0.26f), sway = between(d, -0.06f, 0.06f);
            float width = between(d, 0.006f, 0.011f);
            paint_blade(to, root, height, sway, width, dim(green, between(d, 0.7f, 1.3f)));
        }
    }
}

/* Draws the picture that `key` stands for into `image`; returns the type of its scene. */
static int picture_draw(canvas *to, uint64_t key, int kind, int place, float difficulty, spm_image *image)
{
    draws scene_draws = draws_of(key, 1), bird_draws = draws_of(key, 2);
    draws front_draws = draws_of(key, 3), light_draws = draws_of(key, 4);
    scene s = scene_draw(&scene_draws, place);
    bird b = bird_draw(&bird_draws, kind, place, difficulty);
    float light = between(&light_draws, 0.78f, 1.12f), warmth = between(&light_draws, -0.06f, 0.06f);
    float grain = between(&light_draws, 0.0f, 0.02f);
    float tint[3];
    size_t i, n = (size_t)to->size * (size_t)to->size;
    int c;
    scene_paint(to, &s, &scene_draws);
    if (!b.swims) {
        point foot = bird_to_picture(&b, point_of(0.0f, -b.body_height - b.leg));
        if (chance(&front_draws, place == WATER ? 0.7f : 0.35f)) perch_paint(to, &b, &s, &front_draws);
        else paint_ellipse(to, foot, 0.9f * b.scale, 0.16f * b.scale, dim(s.ground_dark, 0.5f), 0.5f, 0.04f);
    } else {
        paint_ellipse(to, bird_to_picture(&b, point_of(0.0f, b.waterline - 0.3f)), 0.9f * b.scale, 0.35f * b.scale,
                      blend(b.back, s.ground_dark, 0.6f), 0.6f, 0.05f); /* its mirror image */
    }
    bird_paint(to, &b);
    front_paint(to, &b, &s, &front_draws);
    tint[0] = light * (1.0f + warmth);
    tint[1] = light;
    tint[2] = light * (1.0f - warmth);
    for (i = 0; i < n; i++) {
        float v[3], g = grain * (lattice(s.key + 99u, (int)i, 0) - 0.5f);
        v[0] = to->pixels[i].r;
        v[1] = to->pixels[i].g;
        v[2] = to->pixels[i].b;
        for (c = 0; c < 3; c++)
            image->pixels[3 * i + (size_t)c] = (uint8_t)(255.0f * clampf(v[c] * tint[c] + g, 0.0f, 1.0f) + 0.5f);
    }
    return (int)s.type;
}
/* ================================================================================================================
 * The command line and the folder
 * ============================================================================================================= */

enum { OUT, TRAIN, VAL, TEST, SIZE, CORRELATION, DIFFICULTY, SEED, QUALITY, FORCE };

static const tool_option options[] = {
    { "out", 's', "DIR", NULL, "the folder to write: metadata.csv and images/{train,val,test}/NNNNN.jpg", 0, 0 },
    { "train", 'i', "N", "2000", "training pictures", 0, 1000000 },
    { "val", 'i', "N", "400", "validation pictures", 0, 1000000 },
    { "test", 'i', "N", "1000", "test pictures", 0, 1000000 },
    { "size", 'i', "N", "64", "width and height in pixels", 16, 1024 },
    { "correlation", 'n', "F", "0.95", "share of training pictures whose place agrees with the bird", 0, 1 },
    { "difficulty", 'n', "F", "0.5", "0: the kinds are far apart, 1: hardly to be told apart", 0, 1 },
    { "seed", 'i', "S", "1", "another seed gives other pictures; the same seed gives the same bytes", 0,
      9007199254740992.0 },
    { "quality", 'i', "N", "95", "of the JPEG files", 1, 100 },
    TOOL_FORCE,
};

typedef struct work {
    tool *t;
    spm_context *ctx;
    tool_item *items;
} work;

/* Draws item `index`, and notes which scene it got. */
static void make(void *user, const tool_item *item, long index, spm_image *image, spm_error *err)
{
    work *w = (work *)user;
    canvas c;
    uint64_t key = spm_random_key(tool_seed(w->t, SEED), (uint64_t)item->split, (uint64_t)item->source);
    int number;
    c.size = (int)tool_whole(w->t, SIZE);
    c.pixels = (colour *)malloc((size_t)c.size * (size_t)c.size * sizeof(colour));
    if (!c.pixels) {
        err->status = SPM_E_MEMORY;
        snprintf(err->text, sizeof err->text, "out of memory");
        return;
    }
    if (!spm_image_create(w->ctx, c.size, c.size, image, err)) {
        number = picture_draw(&c, key, item->y, item->a, (float)tool_number(w->t, DIFFICULTY), image);
        snprintf(w->items[index].place, sizeof w->items[index].place, "%s/%s", item->a == WATER ? "water" : "land",
                 scene_names[number]);
    }
    free(c.pixels);
}

/* Kinds by turns, in a drawn order; of each kind the first ones stand where they are at home. 0 if memory runs out. */
static int fill_split(work *w, int split, long first, long n)
{
    double share = split == 0 ? tool_number(w->t, CORRELATION) : 0.5;
    int64_t *order = (int64_t *)malloc((size_t)(n ? n : 1) * sizeof *order);
    long i;
    if (!order) return 0;
    spm_random_permutation(tool_seed(w->t, SEED), 1000u + (uint64_t)split, n, order);
    for (i = 0; i < n; i++) {
        tool_item *item = &w->items[first + i];
        long rank = (long)order[i], kind = rank % 2;
        item->y = (int)kind;
        item->a = rank / 2 < (long)floor(share * (double)((n + 1 - kind) / 2) + 0.5) ? (int)kind : (int)(1 - kind);
        item->source = i;
        tool_item_number(item, split, i, "jpg");
    }
    free(order);
    return 1;
}

static int write_set(work *w)
{
    tool *t = w->t;
    tool_set set;
    long n[SPM_SPLITS], first = 0, count = 0;
    char made[512];
    int split;
    for (split = 0; split < SPM_SPLITS; split++) count += n[split] = tool_whole(t, TRAIN + split);
    if (!count) {
        tool_fail(t, "--train, --val and --test are all 0: there is nothing to draw");
        return 2;
    }
    w->items = (tool_item *)calloc((size_t)count, sizeof *w->items);
    for (split = 0; split < SPM_SPLITS; split++) {
        if (!w->items || !fill_split(w, split, first, n[split])) return tool_fail(t, "out of memory");
        first += n[split];
    }
    set = tool_set_make(t, w->ctx, tool_value(t, OUT), w->items, count, make, w);
    set.quality = (int)tool_whole(t, QUALITY);
    snprintf(made, sizeof made, "{\"tool\":\"synth_birds\",\"version\":1,\"seed\":%.0f,\"size\":%ld,\"quality\":%d,"
             "\"correlation\":%.6g,\"difficulty\":%.6g,\"train\":%ld,\"val\":%ld,\"test\":%ld}\n",
             tool_number(t, SEED), tool_whole(t, SIZE), set.quality, tool_number(t, CORRELATION),
             tool_number(t, DIFFICULTY), n[0], n[1], n[2]);
    return tool_write_set(&set, "synth_birds.json", made, tool_on(t, FORCE));
}

static int run(tool *t, spm_context *ctx)
{
    work w = SPM_ZERO;
    int status;
    w.t = t;
    w.ctx = ctx;
    status = write_set(&w);
    free(w.items);
    return status;
}

int main(int argc, char **argv)
{
    tool t = tool_make("synth_birds",
        "usage: synth_birds --out DIR [options]\n\n"
        "Draws a data set of bird pictures (JPEG) in the Waterbirds layout: landbirds and waterbirds on land and\n"
        "on water. The place is easy to see, the kind of bird is not; in training the place agrees with the kind\n"
        "almost always, in validation and test for half of the pictures.\n",
        "metadata.csv has the columns img_id,img_filename,y,split,place,place_filename:\n"
        "  y 0 landbird, 1 waterbird; place 0 land, 1 water; split 0 train, 1 val, 2 test.\n",
        options, sizeof options / sizeof options[0]);
    return tool_main(&t, argc, argv, run);
}
