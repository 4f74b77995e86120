// Which tiles of the score matrix a block of positions meets: integer arithmetic that the kernels
// and a test on the CPU compile from this one file. Query i sees key j where
// i - left <= j <= i + right; positions of both start at 0.
#pragma once

#ifdef __CUDACC__
#define ATTENTION_HOST_DEVICE __host__ __device__
#else
#define ATTENTION_HOST_DEVICE
#endif

namespace attention {

// A side without a limit. Positions stay below it, so that sums of two fit an int.
constexpr int UNLIMITED = 1 << 29;

struct Band {
    int left, right;
};

// Tiles [first, last); empty where last <= first.
struct Range {
    int first, last;
    ATTENTION_HOST_DEVICE constexpr int count() const { return last > first ? last - first : 0; }
};

ATTENTION_HOST_DEVICE constexpr int at_least(int x, int low) { return x < low ? low : x; }
ATTENTION_HOST_DEVICE constexpr int at_most(int x, int high) { return x > high ? high : x; }

// Tiles of `size` positions in [0, count) that hold a position in [low, high].
ATTENTION_HOST_DEVICE constexpr Range tiles_in(int low, int high, int count, int size) {
    low = at_least(low, 0);
    high = at_most(high, count - 1);
    return high < low ? Range{0, 0} : Range{low / size, high / size + 1};
}

// Tiles of keys that queries [row, row + rows) see.
ATTENTION_HOST_DEVICE constexpr Range keys_seen(Band band, int row, int rows, int queries, int keys,
                                                int size) {
    const int last = at_most(row + rows, queries) - 1;
    return last < row ? Range{0, 0} : tiles_in(row - band.left, last + band.right, keys, size);
}

// Tiles of queries that see keys [column, column + columns).
ATTENTION_HOST_DEVICE constexpr Range queries_seeing(Band band, int column, int columns,
                                                     int queries, int keys, int size) {
    const int last = at_most(column + columns, keys) - 1;
    return last < column ? Range{0, 0}
                         : tiles_in(column - band.right, last + band.left, queries, size);
}

ATTENTION_HOST_DEVICE constexpr Range both(Range a, Range b) {
    return Range{at_least(a.first, b.first), at_most(a.last, b.last)};
}

ATTENTION_HOST_DEVICE constexpr bool sees(Band band, int row, int column) {
    return column <= row + band.right && column >= row - band.left;
}

// Whether every query of [row, row + rows) sees every key of [column, column + columns).
ATTENTION_HOST_DEVICE constexpr bool all_seen(Band band, int row, int rows, int column,
                                              int columns) {
    return column + columns - 1 <= row + band.right && column >= row + rows - 1 - band.left;
}

// Whether no query of the tile sees any key of it.
ATTENTION_HOST_DEVICE constexpr bool none_seen(Band band, int row, int rows, int column,
                                               int columns) {
    return column > row + rows - 1 + band.right || column + columns - 1 < row - band.left;
}

}  // namespace attention
