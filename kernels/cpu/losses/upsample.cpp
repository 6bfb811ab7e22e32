// The class of the largest of resized logits, and its softmax probability.
//
// LOGITS: the dtype of the logits.
#include "softmax.h"
#include "upsample.h"

using T = LOGITS;
using W = Computed<T>;
constexpr int K = VECTORS<W>;

template <typename L> static INLINE void write_labels(const Int<W>* best, int count, L* to) {
    for (int i = 0; i < count; ++i) to[i] = L(best[i]);
}

// Writes labels (n, height, width) of label_size bytes each, and probabilities where they are wanted. Both by image.
EXPORT upsample_argmax(const T* low, int64_t n, int64_t classes, int64_t h, int64_t w, int64_t stride_n,
                       int64_t stride_c, int64_t stride_h, int64_t stride_w, int64_t height, int64_t width,
                       int64_t nearest, int64_t corners, double ratio_h, double ratio_w, void* labels,
                       int64_t label_size, W* probability) {
    Resized<T, W> map{MAP_ARGUMENTS};
    parallel_for(map.units(), grain_of(map.elements_of_unit()), [&](int64_t begin, int64_t end) {
        Interval<W> interval(map);
        Scratch<W> values(classes * TILE);
        Int<W> best[TILE], none[TILE];
        for (int i = 0; i < TILE; ++i) none[i] = -1;
        for (int64_t unit = begin; unit < end; ++unit) {
            int64_t image = unit / h, tap = unit % h, top = map.y.start_of(tap), bottom = map.y.start_of(tap + 1);
            if (top == bottom) continue;
            interval.read(map, image, tap);
            for (int64_t start = 0; start < width; start += TILE) {
                int count = int(width - start < TILE ? width - start : TILE);
                interval.expand(map, start);
                for (int64_t y = top; y < bottom; ++y) {
                    int64_t pixel = (image * height + y) * width + start;
                    interval.mix(classes, map.y.behind.data[y], values.data);
                    Rows<W> rows{values.data, TILE};
                    argmax(rows, classes, best);
                    switch (label_size) {
                        case 1: write_labels(best, count, static_cast<uint8_t*>(labels) + pixel); break;
                        case 2: write_labels(best, count, static_cast<int16_t*>(labels) + pixel); break;
                        case 4: write_labels(best, count, static_cast<int32_t*>(labels) + pixel); break;
                        default: write_labels(best, count, static_cast<int64_t*>(labels) + pixel);
                    }
                    if (probability == nullptr) continue;
                    Vec<W> highest[K], total[K], others[K], picked[K];
                    W share[TILE];
                    find_highest(rows, classes, highest);
                    add_exponentials<false>(rows, classes, highest, none, values.data, total, others, picked);
                    for (int k = 0; k < K; ++k) store(share + k * LANES<W>, W(1) / total[k]);
                    memcpy(probability + pixel, share, count * sizeof(W));
                }
            }
        }
    });
    return 0;
}
