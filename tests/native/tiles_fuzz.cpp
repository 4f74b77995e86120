// Which tiles the attention kernels visit, against every pair of positions.
//     tiles_fuzz CASES SEED
#include <cstdio>
#include <cstdlib>
#include <random>

#include "../../kernels/attention/thunderkittens/tiles.cuh"

using namespace attention;

#define CHECK(OK)                                                                              \
    if (!(OK)) {                                                                               \
        std::fprintf(stderr, "%s: band %d %d, %d queries, %d keys, size %d, block %d of %d\n", \
                     #OK, band.left, band.right, queries, keys, size, start, block);           \
        return 1;                                                                              \
    }

int main(int argc, char **argv) {
    const long cases = argc > 1 ? std::atol(argv[1]) : 1000;
    std::mt19937 random(argc > 2 ? std::atol(argv[2]) : 1);
    auto below = [&](int n) { return int(random() % unsigned(n)); };
    for (long n = 0; n < cases; n++) {
        const int queries = 1 + below(40), keys = 1 + below(40), size = 1 + below(9);
        const int block = 1 + below(12), start = below(6) * block;
        const Band band = {below(3) ? below(45) : UNLIMITED, below(3) ? below(45) : UNLIMITED};

        // A range holds exactly the tiles between the first and the last that have a visible pair.
        int first = -1, last = -1;
        for (int i = start; i < start + block && i < queries; i++)
            for (int j = 0; j < keys; j++)
                if (sees(band, i, j)) {
                    if (first < 0 || j / size < first) first = j / size;
                    if (j / size > last) last = j / size;
                }
        Range seen = keys_seen(band, start, block, queries, keys, size);
        CHECK(seen.count() == (first < 0 ? 0 : last - first + 1))
        CHECK(first < 0 || seen.first == first)

        first = last = -1;
        for (int j = start; j < start + block && j < keys; j++)
            for (int i = 0; i < queries; i++)
                if (sees(band, i, j)) {
                    if (first < 0 || i / size < first) first = i / size;
                    if (i / size > last) last = i / size;
                }
        seen = queries_seeing(band, start, block, queries, keys, size);
        CHECK(seen.count() == (first < 0 ? 0 : last - first + 1))
        CHECK(first < 0 || seen.first == first)

        const int column = below(40), columns = 1 + below(9);
        bool all = true, none = true;
        for (int i = start; i < start + block; i++)
            for (int j = column; j < column + columns; j++) {
                all = all && sees(band, i, j);
                none = none && !sees(band, i, j);
            }
        CHECK(all_seen(band, start, block, column, columns) == all)
        CHECK(none_seen(band, start, block, column, columns) == none)

        const Range a = {below(9), below(9)}, b = {below(9), below(9)}, meet = both(a, b);
        for (int i = 0; i < 9; i++) {
            const bool in = i >= a.first && i < a.last && i >= b.first && i < b.last;
            CHECK((i >= meet.first && i < meet.last) == in)
        }
    }
    std::printf("%ld cases\n", cases);
    return 0;
}
