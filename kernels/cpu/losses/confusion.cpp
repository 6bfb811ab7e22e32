// The confusion matrix of two label maps: how often each class was taken for each.
#include "tile.h"

constexpr int64_t LOCAL = 1 << 16;  // entries of a matrix that each thread counts in one of its own
constexpr int64_t COPIES = 4;       // of a small one: neighbouring pixels, mostly alike, do not wait for each other
constexpr int64_t SMALL = 2048;     // entries

// Writes counts (classes, classes). Returns 0, or 1 if a prediction and 2 if a target is out of range.
EXPORT confusion_matrix(const void* pred, int64_t pred_size, const void* target, int64_t target_size, int64_t pixels,
                        int64_t classes, int64_t ignores, int64_t ignored, int64_t* counts) {
    int64_t bad_target = 0, bad_pred = 0, unused = 0, entries = classes * classes;
    Labels truths{target, target_size, ignored, classes, &bad_target, ignores != 0};
    Labels guesses{pred, pred_size, 0, classes, &unused, false};
    for (int64_t i = 0; i < entries; ++i) counts[i] = 0;
    int64_t tiles = (pixels + TILE - 1) / TILE, copies = entries <= SMALL ? COPIES : 1;
    bool local = entries <= LOCAL;
    int64_t pitch = entries + 1;  // the last entry takes the pixels that do not count
    parallel_for(tiles, (1 << 16) / TILE + (local ? entries / TILE : 0), [&](int64_t begin, int64_t end) {
        Scratch<int64_t> own(local ? copies * pitch : 1);
        for (int64_t i = 0; local && i < copies * pitch; ++i) own.data[i] = 0;
        int32_t truth[TILE], guess[TILE];
        int64_t entry[TILE];
        int32_t strange = 0;
        for (int64_t tile = begin; tile < end; ++tile) {
            int64_t first = tile * TILE;
            int count = int(pixels - first < TILE ? pixels - first : TILE);
            truths.read(first, count, truth);
            guesses.read(first, count, guess);
            for (int i = 0; i < TILE; ++i) {
                entry[i] = truth[i] < 0 || guess[i] < 0 ? entries : truth[i] * classes + guess[i];
                strange |= truth[i] >= 0 && guess[i] < 0;
            }
            if (!local) {
                for (int i = 0; i < count; ++i)
                    if (entry[i] != entries) __atomic_fetch_add(counts + entry[i], 1, __ATOMIC_RELAXED);
            } else if (copies == COPIES) {
                for (int i = 0; i < TILE; i += COPIES)
                    for (int copy = 0; copy < COPIES; ++copy) ++own.data[copy * pitch + entry[i + copy]];
            } else {
                for (int i = 0; i < TILE; ++i) ++own.data[entry[i]];
            }
        }
        if (strange) __atomic_store_n(&bad_pred, 1, __ATOMIC_RELAXED);
        for (int64_t i = 0; local && i < entries; ++i) {
            int64_t sum = 0;
            for (int64_t copy = 0; copy < copies; ++copy) sum += own.data[copy * pitch + i];
            if (sum != 0) __atomic_fetch_add(counts + i, sum, __ATOMIC_RELAXED);
        }
    });
    return bad_pred != 0 ? 1 : bad_target != 0 ? 2 : 0;
}
