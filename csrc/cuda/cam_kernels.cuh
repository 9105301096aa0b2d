// Grad-CAM on the GPU: activations and weights in, maps, heatmaps and overlays out, in two launches.
//
// Compiled by nvcc, by NVRTC and, with csrc/tests/cuda_shim.hpp, by a C++ compiler: no #include, no CUDA header. Only
// the extern "C" functions at the end are called from outside, each with one structure; kernels/launches.py packs these
// structures, chooses the kernel and its geometry, and says why.
//
// First launch (channel, pooled, element): each block sums a slice of the channels of one image over some pixels, for
// up to `Maps` maps, into `partials`: (images, maps, parts, pixels). Second launch (view): each block adds the parts of
// one map in order, normalises it, and draws a rectangle of its heatmap. There are no atomic additions, and the slices
// depend only on the shape of one image: results are bit-identical for any batch.

// The parts of this file to compile: the kernels for one type of activations, or those for all types.
#define CAM_ANY 0
#define CAM_FLOAT32 1
#define CAM_FLOAT16 2
#define CAM_BFLOAT16 3

#define CAM_INLINE __device__ __forceinline__

// Types in memory.

struct Half {
    unsigned short bits;
};
struct Bfloat {
    unsigned short bits;
};

constexpr int type_float32 = 0;
constexpr int type_float16 = 1;  // 2: bfloat16

CAM_INLINE float to_float(float value) { return value; }

CAM_INLINE float to_float(Bfloat value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }

CAM_INLINE float to_float(Half value) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#else
    // A multiplication shifts the exponent; it also renormalises subnormal halves.
    const float moved = __uint_as_float(static_cast<unsigned>(value.bits & 0x7fff) << 13) * 0x1p112f;
    const unsigned bits = __float_as_uint(moved) | (moved >= 0x1p16f ? 0x7f800000u : 0u);  // infinity or NaN
    return __uint_as_float(bits | static_cast<unsigned>(value.bits & 0x8000) << 16);
#endif
}

constexpr double largest_float = 3.402823466e38;

CAM_INLINE bool is_finite(float value) { return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u; }

// `Count` adjacent elements, loaded at once.

template <int Bytes>
struct Word;
template <>
struct Word<2> {
    using Type = unsigned short;
};
template <>
struct Word<4> {
    using Type = unsigned;
};
template <>
struct Word<8> {
    using Type = uint2;
};
template <>
struct Word<16> {
    using Type = uint4;
};

CAM_INLINE void split(unsigned short word, unsigned (&parts)[1]) { parts[0] = word; }
CAM_INLINE void split(unsigned word, unsigned (&parts)[1]) { parts[0] = word; }
CAM_INLINE void split(uint2 word, unsigned (&parts)[2]) {
    parts[0] = word.x;
    parts[1] = word.y;
}
CAM_INLINE void split(uint4 word, unsigned (&parts)[4]) {
    parts[0] = word.x;
    parts[1] = word.y;
    parts[2] = word.z;
    parts[3] = word.w;
}

template <class T, int Count>
struct Pack {
    typename Word<Count * static_cast<int>(sizeof(T))>::Type word;

    CAM_INLINE void load(const T* source) { word = __ldg(reinterpret_cast<const decltype(word)*>(source)); }

    CAM_INLINE void unpack(float (&values)[Count]) const {
        unsigned parts[(sizeof(word) + 3) / 4];
        split(word, parts);
#pragma unroll
        for (int e = 0; e < Count; ++e) values[e] = element(parts, e, T{});
    }

private:
    static CAM_INLINE float element(const unsigned* parts, int e, float) { return __uint_as_float(parts[e]); }
    template <class Short>
    static CAM_INLINE float element(const unsigned* parts, int e, Short) {
        return to_float(Short{static_cast<unsigned short>(parts[e / 2] >> (e % 2 * 16))});
    }
};

// An element whose type is only known at run time. Slower: for shapes that do not consist of packs.
struct Any {};
template <>
struct Pack<Any, 1> {
    float value;

    CAM_INLINE void unpack(float (&values)[1]) const { values[0] = value; }
};

template <class T>
struct Source {
    const T* data;

    CAM_INLINE Source(const void* start, int) : data(static_cast<const T*>(start)) {}

    template <int Count>
    CAM_INLINE Pack<T, Count> load(long long index) const {
        Pack<T, Count> pack;
        pack.load(data + index);
        return pack;
    }
};

template <>
struct Source<Any> {
    const void* data;
    int type;

    CAM_INLINE Source(const void* start, int type_of_elements) : data(start), type(type_of_elements) {}

    CAM_INLINE float operator[](long long index) const {
        if (type == type_float32) return __ldg(static_cast<const float*>(data) + index);
        const unsigned short bits = __ldg(static_cast<const unsigned short*>(data) + index);
        return type == type_float16 ? to_float(Half{bits}) : to_float(Bfloat{bits});
    }

    template <int Count>
    CAM_INLINE Pack<Any, 1> load(long long index) const {
        static_assert(Count == 1, "no packs of unknown type");
        return {(*this)[index]};
    }
};

// Blocks and warps.

constexpr int warp_threads = 32;
constexpr unsigned all_lanes = 0xffffffffu;
// Maximum threads per block; launches.py has the same number.
constexpr int most_threads = 256;

extern __shared__ uint4 shared_memory[];

CAM_INLINE float* shared_floats() { return reinterpret_cast<float*>(shared_memory); }
CAM_INLINE int thread() { return static_cast<int>(threadIdx.x); }
CAM_INLINE int threads() { return static_cast<int>(blockDim.x); }
CAM_INLINE int lane() { return thread() % warp_threads; }
CAM_INLINE int warp() { return thread() / warp_threads; }
CAM_INLINE int warps() { return threads() / warp_threads; }

CAM_INLINE int least(int a, int b) { return a < b ? a : b; }

// Sums `Count` values over the lanes of a warp, Count a power of two: lane l returns the total of value
// l / (32 / Count). Each exchange halves the number of values that a lane is responsible for: at most Count + 4
// shuffles instead of 5 * Count.
template <int Offset = warp_threads / 2, int Count>
CAM_INLINE float sum_over_lanes(const float (&values)[Count]) {
    if constexpr (Offset == 0) {
        return values[0];
    } else if constexpr (Count == 1) {
        const float sums[1] = {values[0] + __shfl_xor_sync(all_lanes, values[0], Offset)};
        return sum_over_lanes<Offset / 2>(sums);
    } else {
        const bool upper = (lane() & Offset) != 0;
        float sums[Count / 2];
#pragma unroll
        for (int i = 0; i < Count / 2; ++i) {
            const float given = upper ? values[i] : values[i + Count / 2];
            const float mine = upper ? values[i + Count / 2] : values[i];
            sums[i] = mine + __shfl_xor_sync(all_lanes, given, Offset);
        }
        return sum_over_lanes<Offset / 2>(sums);
    }
}

// The first launch.

struct SumCall {
    const void* activations;  // (images, channels, pixels), or (images, pixels, channels) for the kernels "last"
    const void* weights;      // (images, maps, channels), or (images, maps) times the shape of an image of activations
    float* partials;          // (images, maps, parts, pixels)
    int channels;
    int pixels;
    int maps;
    int slices;          // number of slices of the channels
    int slice_channels;  // channels per slice, except in the last one
    int tiles;           // number of tiles of the pixels
    int tile_blocks;     // blocks that share the tiles: 1 if a block has to pool gradients first, which it does once
    int tile_size;       // "first": packs per tile; "last": pixels per tile
    int group;           // "first": number of channels after which packs and channels align again
    int rows;            // "first": groups that a block reads at once
    int parts;
    int values_type;
    int weights_type;
    int scratch_size;  // floats of shared memory, after pooled weights, or in place of other weights
};

// The work of one block.
template <int Maps>
struct Share {
    int first_map;
    int maps;
    int tile;  // the first one
    int slice;
    int image;
    int first_channel;
    int channels;

    explicit CAM_INLINE Share(const SumCall& call) {
        // Blocks that read the same activations for other maps are adjacent: the second one finds them in the cache.
        const int map_tiles = (call.maps + Maps - 1) / Maps;
        int block = static_cast<int>(blockIdx.x);
        first_map = block % map_tiles * Maps;
        maps = least(Maps, call.maps - first_map);
        block /= map_tiles;
        tile = block % call.tile_blocks;
        block /= call.tile_blocks;
        slice = block % call.slices;
        image = block / call.slices;
        first_channel = slice * call.slice_channels;
        channels = least(call.slice_channels, call.channels - first_channel);
    }

    // Offset of the first activation of the image.
    CAM_INLINE long long image_index(const SumCall& call) const {
        return static_cast<long long>(image) * call.channels * call.pixels;
    }

    CAM_INLINE long long map_index(const SumCall& call, int map) const {
        return static_cast<long long>(image) * call.maps + first_map + map;
    }
};

// Offset of the slice's weights in shared memory, in floats.
struct Stored {
    int channel_stride;
    int map_stride;
};

template <int Maps>
CAM_INLINE void fetch_weights(const SumCall& call, const Share<Maps>& share, Stored stored, float* target) {
    const Source<Any> weights(call.weights, call.weights_type);
#pragma unroll 1
    for (int map = 0; map < Maps; ++map) {
        const long long source = share.map_index(call, map) * call.channels + share.first_channel;
        for (int c = thread(); c < share.channels; c += threads()) {
            target[c * stored.channel_stride + map * stored.map_stride] =
                map < share.maps ? weights[source + c] : 0.0f;
        }
    }
    __syncthreads();
}

// target[r] = mean of row r of (rows, columns), starting at element `start`.
template <class W, int Count>
CAM_INLINE void mean_rows(Source<W> source, long long start, int rows, int columns, int stride, float* target) {
    constexpr int together = 4;
    for (int first = warp() * together; first < rows; first += warps() * together) {
        float sums[together] = {};
        for (int column = lane() * Count; column < columns; column += warp_threads * Count) {
            Pack<W, Count> packs[together];
#pragma unroll
            for (int r = 0; r < together; ++r) {
                const long long row = least(first + r, rows - 1);
                packs[r] = source.template load<Count>(start + row * columns + column);
            }
#pragma unroll
            for (int r = 0; r < together; ++r) {
                float values[Count];
                packs[r].unpack(values);
#pragma unroll
                for (int e = 0; e < Count; ++e) sums[r] += values[e];
            }
        }
        const float total = sum_over_lanes(sums);
        constexpr int holders = warp_threads / together;
        const int row = first + lane() / holders;
        if (lane() % holders == 0 && row < rows) target[row * stride] = total / static_cast<float>(columns);
    }
}

// target[c] = mean of column c of (rows, row_stride), of the first `columns` from element `start` on.
// scratch: warps * columns floats.
template <class W, int Count>
CAM_INLINE void mean_columns(Source<W> source, long long start, int rows, int columns, int row_stride, float* scratch,
                             int stride, float* target) {
    for (int column = lane() * Count; column < columns; column += warp_threads * Count) {
        float sums[Count] = {};
#pragma unroll 4
        for (int row = warp(); row < rows; row += warps()) {
            float values[Count];
            source.template load<Count>(start + static_cast<long long>(row) * row_stride + column).unpack(values);
#pragma unroll
            for (int e = 0; e < Count; ++e) sums[e] += values[e];
        }
#pragma unroll
        for (int e = 0; e < Count; ++e) scratch[warp() * columns + column + e] = sums[e];
    }
    __syncthreads();
    for (int column = thread(); column < columns; column += threads()) {
        float total = 0;
        for (int w = 0; w < warps(); ++w) total += scratch[w * columns + column];
        target[column * stride] = total / static_cast<float>(rows);
    }
    __syncthreads();
}

// The mean of the gradients over the pixels, Selvaraju et al. 2017, eq. 1.
template <bool Last, class W, int Count, int Maps>
CAM_INLINE void pool_gradients(const SumCall& call, const Share<Maps>& share, Stored stored, float* target) {
    const Source<W> source(call.weights, call.weights_type);
    const long long image_size = static_cast<long long>(call.channels) * call.pixels;
    float* const scratch = target + share.channels * Maps;
#pragma unroll 1
    for (int map = 0; map < Maps; ++map) {
        float* const means = target + map * stored.map_stride;
        if (map >= share.maps) {
            for (int c = thread(); c < share.channels; c += threads()) means[c * stored.channel_stride] = 0;
            continue;
        }
        const long long start = share.map_index(call, map) * image_size;
        if (Last) {
            mean_columns<W, Count>(source, start + share.first_channel, call.pixels, share.channels, call.channels,
                                   scratch, stored.channel_stride, means);
        } else {
            mean_rows<W, Count>(source, start + static_cast<long long>(share.first_channel) * call.pixels,
                                share.channels, call.pixels, stored.channel_stride, means);
        }
    }
    __syncthreads();
}

template <bool Last, bool Pooled, int Maps>
CAM_INLINE void make_weights(const SumCall& call, const Share<Maps>& share, Stored stored, float* target) {
    if constexpr (!Pooled) {
        fetch_weights(call, share, stored, target);
    } else {
        // Number and offset of contiguous elements, in whole packs.
        const bool packed = Last ? call.channels % 4 == 0 && call.slice_channels % 4 == 0 : call.pixels % 4 == 0;
        if (packed && call.weights_type == type_float32) {
            pool_gradients<Last, float, 4>(call, share, stored, target);
        } else {
            pool_gradients<Last, Any, 1>(call, share, stored, target);
        }
    }
}

// Channels first. A group of channels is a row of packs: `group` is the smallest number of channels that fills whole
// packs (7 x 7 float32: 4 channels, 49 packs), so that loads are aligned for any number of pixels. Thread t keeps pack
// t % tile_size of every `rows`-th group: its elements are the same pixels each time, and it adds them in registers. A
// pack holds elements of one channel, or of two: those before `boundary` and those after it.

struct Place {
    int row;
    int pack;      // index in the tile
    bool active;
    int offset;    // of the pack within the group, in elements
    int channel;   // of its first element, within the group
    int boundary;  // number of elements of that channel

    CAM_INLINE Place(const SumCall& call, int tile, int count) {
        row = thread() / call.tile_size;
        pack = thread() % call.tile_size;
        const int packs = static_cast<int>(static_cast<long long>(call.group) * call.pixels / count);
        const int column = tile * call.tile_size + pack;
        active = row < call.rows && column < packs;
        offset = column * count;
        channel = offset / call.pixels;
        boundary = least(count, call.pixels - offset % call.pixels);
    }
};

// Floats between the weights of two channels: without padding, 16 maps would share two banks of shared memory.
template <int Maps>
constexpr int padded_maps = Maps < 8 ? Maps : Maps + 4;

template <int Maps>
CAM_INLINE void load_shared(const float* source, float (&values)[Maps]) {
    if constexpr (Maps % 4 == 0) {
#pragma unroll
        for (int i = 0; i < Maps; i += 4) {
            const float4 four = *reinterpret_cast<const float4*>(source + i);
            values[i] = four.x;
            values[i + 1] = four.y;
            values[i + 2] = four.z;
            values[i + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < Maps; ++i) values[i] = source[i];
    }
}

template <bool Split, class T, int Count, int Maps>
CAM_INLINE void add_pack(const Pack<T, Count>& pack, const float* weights, int boundary, float (&sums)[Maps][Count]) {
    constexpr int at_once = Maps < 4 ? Maps : 4;
    float values[Count];
    pack.unpack(values);
#pragma unroll
    for (int map = 0; map < Maps; map += at_once) {
        float before[at_once];
        float behind[at_once];
        load_shared(weights + map, before);
        if (Split) load_shared(weights + (boundary < Count ? padded_maps<Maps> : 0) + map, behind);
#pragma unroll
        for (int m = 0; m < at_once; ++m) {
#pragma unroll
            for (int e = 0; e < Count; ++e) {
                sums[map + m][e] += (Split && e >= boundary ? behind[m] : before[m]) * values[e];
            }
        }
    }
}

template <bool Split, class T, int Count, int Maps>
CAM_INLINE void add_packs(Source<T> source, long long at, long long stride, int count, const float* weights,
                          int weights_stride, int boundary, float (&sums)[Maps][Count]) {
    constexpr int unroll = Maps * Count <= 16 ? 4 : 2;
#pragma unroll 1
    for (; count >= unroll; count -= unroll) {
        Pack<T, Count> packs[unroll];
#pragma unroll
        for (int u = 0; u < unroll; ++u) packs[u] = source.template load<Count>(at + u * stride);
#pragma unroll
        for (int u = 0; u < unroll; ++u) add_pack<Split>(packs[u], weights + u * weights_stride, boundary, sums);
        at += unroll * stride;
        weights += unroll * weights_stride;
    }
#pragma unroll 1
    for (; count > 0; --count) {
        add_pack<Split>(source.template load<Count>(at), weights, boundary, sums);
        at += stride;
        weights += weights_stride;
    }
}

// Adds the rows of a block, and the channels of a group if one tile holds all of it, in order.
template <int Maps, int Count>
CAM_INLINE void store_sums(const SumCall& call, const Share<Maps>& share, const Place& place, int tile, float* scratch,
                           const float (&sums)[Maps][Count]) {
    const int row_size = call.tile_size * Count;
    const int map_size = call.rows * row_size;
    const int at_once = least(call.scratch_size / map_size, share.maps);
    const int folds = call.tiles == 1 ? call.group : 1;
    const int unfolded = call.tiles == 1 ? 1 : call.group;
    const int group_size = call.group * call.pixels;
    const int span = call.tiles == 1 ? call.pixels : least(row_size, group_size - tile * row_size);
#pragma unroll 1
    for (int first = 0; first < share.maps; first += at_once) {
        const int maps = least(at_once, share.maps - first);
        __syncthreads();
#pragma unroll
        for (int map = 0; map < Maps; ++map) {
            if (!place.active || map < first || map >= first + maps) continue;
            float* const target = scratch + (map - first) * map_size + place.row * row_size + place.pack * Count;
#pragma unroll
            for (int e = 0; e < Count; ++e) target[e] = sums[map][e];
        }
        __syncthreads();
#pragma unroll 1
        for (int i = thread(); i < maps * span; i += threads()) {
            const int map = i / span;
            const int position = i % span;
            const float* const source = scratch + map * map_size + position;
            float total = 0;
            for (int row = 0; row < call.rows; ++row) {
                for (int fold = 0; fold < folds; ++fold) total += source[row * row_size + fold * span];
            }
            const long long part = share.map_index(call, first + map) * call.parts + share.slice * unfolded;
            call.partials[part * call.pixels + tile * row_size + position] = total;
        }
    }
    __syncthreads();
}

// Number of groups that a thread adds.
CAM_INLINE int turns(const SumCall& call, const Place& place, int channels) {
    const int groups = channels / call.group;
    return place.active && place.row < groups ? (groups - place.row + call.rows - 1) / call.rows : 0;
}

template <bool Pooled, class T, int Count, int Maps>
CAM_INLINE void sum_first(const SumCall& call) {
    const Share<Maps> share(call);
    constexpr Stored stored{padded_maps<Maps>, 1};
    float* const weights = shared_floats();
    make_weights<false, Pooled>(call, share, stored, weights);
    float* const scratch = weights + (Pooled ? call.slice_channels * stored.channel_stride : 0);
    const Source<T> source(call.activations, call.values_type);
    const long long start = share.image_index(call) + static_cast<long long>(share.first_channel) * call.pixels;
    const int row_channels = call.rows * call.group;
    const long long stride = static_cast<long long>(row_channels) * call.pixels;
    const int weights_stride = row_channels * stored.channel_stride;
    for (int tile = share.tile; tile < call.tiles; tile += call.tile_blocks) {
        const Place place(call, tile, Count);
        const long long at = start + static_cast<long long>(place.row) * call.group * call.pixels + place.offset;
        const float* const coefficients = weights + (place.row * call.group + place.channel) * stored.channel_stride;
        const int count = turns(call, place, share.channels);
        float sums[Maps][Count] = {};
        // With sixteen maps there are no registers for two weights each: launches.py then uses groups of one channel
        // only.
        if (Maps < 16 && call.group > 1) {
            add_packs<true>(source, at, stride, count, coefficients, weights_stride, place.boundary, sums);
        } else {
            add_packs<false>(source, at, stride, count, coefficients, weights_stride, Count, sums);
        }
        store_sums(call, share, place, tile, scratch, sums);
    }
}

// Each activation has its own weight: both are traversed alike.
template <class T, int Count, int Maps>
CAM_INLINE void element_first(const SumCall& call) {
    const Share<Maps> share(call);
    const Source<T> source(call.activations, call.values_type);
    const Source<T> weights(call.weights, call.weights_type);
    const long long image_size = static_cast<long long>(call.channels) * call.pixels;
    const long long map_start = share.map_index(call, 0) * image_size;
    const long long image_start = share.image_index(call);
    const long long stride = static_cast<long long>(call.rows) * call.group * call.pixels;
    const Place place(call, share.tile, Count);
    long long at = (static_cast<long long>(share.first_channel) + place.row * call.group) * call.pixels + place.offset;
    float sums[Maps][Count] = {};
#pragma unroll (Maps == 1 ? 4 : 1)
    for (int count = turns(call, place, share.channels); count > 0; --count) {
        Pack<T, Count> factors[Maps];
#pragma unroll
        for (int map = 0; map < Maps; ++map) {
            factors[map] = weights.template load<Count>(map_start + least(map, share.maps - 1) * image_size + at);
        }
        float values[Count];
        source.template load<Count>(image_start + at).unpack(values);
#pragma unroll
        for (int map = 0; map < Maps; ++map) {
            float unpacked[Count];
            factors[map].unpack(unpacked);
#pragma unroll
            for (int e = 0; e < Count; ++e) sums[map][e] += unpacked[e] * values[e];
        }
        at += stride;
    }
    store_sums(call, share, place, share.tile, shared_floats(), sums);
}

// Channels last. A warp processes a few pixels at a time, with its lanes over the channels, and sums over the lanes at
// the end.

template <int Pixels, int Maps>
CAM_INLINE void store_dots(const SumCall& call, const Share<Maps>& share, int first_pixel, int end,
                           const float (&sums)[Pixels * Maps]) {
    constexpr int holders = warp_threads / (Pixels * Maps);
    const float total = sum_over_lanes(sums);
    const int index = lane() / holders;
    const int pixel = first_pixel + index / Maps;
    const int map = index % Maps;
    if (lane() % holders == 0 && pixel < end && map < share.maps) {
        const long long part = share.map_index(call, map) * call.parts + share.slice;
        call.partials[part * call.pixels + pixel] = total;
    }
}

template <bool Pooled, class T, int Count, int Maps>
CAM_INLINE void sum_last(const SumCall& call) {
    constexpr int together = Maps * Count <= 16 ? 4 : 2;
    const Share<Maps> share(call);
    const Stored stored{1, share.channels};
    float* const weights = shared_floats();
    make_weights<true, Pooled>(call, share, stored, weights);
    const Source<T> source(call.activations, call.values_type);
    const long long start = share.image_index(call) + share.first_channel;
    // A block processes all tiles in turn if it pooled the gradients, otherwise one tile.
    const int end = call.tile_blocks == 1 ? call.pixels : least(call.pixels, (share.tile + 1) * call.tile_size);
    for (int first = share.tile * call.tile_size + warp() * together; first < end; first += warps() * together) {
        float sums[together * Maps] = {};
#pragma unroll 1
        for (int c = lane() * Count; c < share.channels; c += warp_threads * Count) {
            Pack<T, Count> packs[together];
#pragma unroll
            for (int p = 0; p < together; ++p) {
                const long long pixel = least(first + p, end - 1);
                packs[p] = source.template load<Count>(start + pixel * call.channels + c);
            }
#pragma unroll
            for (int map = 0; map < Maps; ++map) {
                float factors[Count];
                load_shared(weights + map * stored.map_stride + c, factors);
#pragma unroll
                for (int p = 0; p < together; ++p) {
                    float values[Count];
                    packs[p].unpack(values);
#pragma unroll
                    for (int e = 0; e < Count; ++e) sums[p * Maps + map] += factors[e] * values[e];
                }
            }
        }
        store_dots<together>(call, share, first, end, sums);
    }
}

template <class T, int Count, int Maps>
CAM_INLINE void element_last(const SumCall& call) {
    constexpr int together = 2;
    const Share<Maps> share(call);
    const Source<T> source(call.activations, call.values_type);
    const Source<T> weights(call.weights, call.weights_type);
    const long long image_size = static_cast<long long>(call.channels) * call.pixels;
    const long long image_start = share.image_index(call);
    const long long map_start = share.map_index(call, 0) * image_size;
    const int end = least(call.pixels, (share.tile + 1) * call.tile_size);
    for (int first = share.tile * call.tile_size + warp() * together; first < end; first += warps() * together) {
        float sums[together * Maps] = {};
#pragma unroll 1
        for (int c = lane() * Count; c < share.channels; c += warp_threads * Count) {
#pragma unroll
            for (int p = 0; p < together; ++p) {
                const long long pixel = least(first + p, end - 1);
                const long long at = pixel * call.channels + share.first_channel + c;
                float values[Count];
                source.template load<Count>(image_start + at).unpack(values);
#pragma unroll
                for (int map = 0; map < Maps; ++map) {
                    const long long map_at = map_start + least(map, share.maps - 1) * image_size + at;
                    float factors[Count];
                    weights.template load<Count>(map_at).unpack(factors);
#pragma unroll
                    for (int e = 0; e < Count; ++e) sums[p * Maps + map] += factors[e] * values[e];
                }
            }
        }
        store_dots<together>(call, share, first, end, sums);
    }
}

// The second launch.

struct ViewCall {
    const float* partials;  // (all maps, parts, pixels)
    float* maps;            // (all maps, pixels)
    float* heatmaps;        // (all maps, height, width), or null
    const unsigned char* images;   // (images, height, width, 3), or null
    const unsigned char* palette;  // (256, 3)
    unsigned char* overlays;       // (all maps, height, width, 3)
    int* finite;                   // (all maps)
    float* evidence;               // (all maps): share of the positive values in the sum of magnitudes before the ReLU
    double alpha;
    int image_maps;
    int parts;
    int map_height;
    int map_width;
    int height;
    int width;
    int tile_rows;
    int tile_columns;  // a multiple of 4
    int tiles_across;
    int tiles;
    int normalization;
    int cached;  // whether a whole map fits into shared memory
};

constexpr int normalization_none = 0;
constexpr int normalization_minmax = 2;

// One output position between two input positions: half-pixel centres, edges repeated.
struct Between {
    int low;
    float fraction;
};

// ((2 i + 1) * inputs - outputs) / (2 * outputs), exact until the last division.
CAM_INLINE Between between(int position, int inputs, int outputs) {
    const long long scale = 2LL * outputs;
    const long long limit = scale * (inputs - 1);
    long long at = (2LL * position + 1) * inputs - outputs;
    at = at < 0 ? 0 : at > limit ? limit : at;
    const long long low = at / scale;
    return {static_cast<int>(low), static_cast<float>(at - low * scale) / static_cast<float>(scale)};
}

// Layout of a block's shared memory.
struct ViewMemory {
    double* kept;     // 256: (1 - alpha) * pixel
    double* tints;    // 256 * 3: alpha * colour
    Between* across;  // tile_columns
    Between* down;    // tile_rows
    float* extremes;  // 5 * warps
    float* map;       // pixels, if cached

    explicit CAM_INLINE ViewMemory(const ViewCall& call) {
        kept = reinterpret_cast<double*>(shared_memory);
        tints = kept + (call.overlays ? 256 : 0);
        across = reinterpret_cast<Between*>(tints + (call.overlays ? 768 : 0));
        down = across + call.tile_columns;
        extremes = reinterpret_cast<float*>(down + call.tile_rows);
        map = extremes + 5 * warps();
    }
};

class MapValues {
public:
    CAM_INLINE MapValues(const ViewCall& call, const ViewMemory& memory, int map)
        : call_(call),
          cache_(call.cached ? memory.map : nullptr),
          pixels_(call.map_height * call.map_width),
          partials_(call.partials + static_cast<long long>(map) * call.parts * pixels_) {
        float low = __uint_as_float(0x7f800000u);
        float high = 0;
        float bad = 0;
        float totals[2] = {0, 0};  // of positive values, and of the magnitudes of the others
        for (int pixel = thread(); pixel < pixels_; pixel += threads()) {
            const float sum = add_parts(pixel);
            if (!is_finite(sum)) bad = 1;
            // Two named sums: an index would put them into local memory.
            totals[0] += sum > 0 ? sum : 0.0f;
            totals[1] -= sum > 0 ? 0.0f : sum;
            const float value = sum > 0 ? sum : 0.0f;
            low = low < value ? low : value;
            high = high > value ? high : value;
            if (cache_) cache_[pixel] = value;
        }
        reduce(memory.extremes, low, high, bad);
        finite_ = bad == 0;
        evidence_ = positive_share(memory.extremes + 3 * warps(), totals);
        low_ = call.normalization == normalization_minmax ? low : 0.0f;
        span_ = high - low_;
        if (cache_) {
            // Each thread reads the pixels that it wrote itself.
            for (int pixel = thread(); pixel < pixels_; pixel += threads()) cache_[pixel] = normalized(cache_[pixel]);
        }
        __syncthreads();
    }

    CAM_INLINE bool finite() const { return finite_; }
    CAM_INLINE float evidence() const { return evidence_; }
    CAM_INLINE int pixels() const { return pixels_; }

    CAM_INLINE float at(int pixel) const {
        if (cache_) return cache_[pixel];
        const float sum = add_parts(pixel);
        return normalized(sum > 0 ? sum : 0.0f);
    }

private:
    CAM_INLINE float add_parts(int pixel) const {
        float sum = 0;
#pragma unroll 4
        for (int part = 0; part < call_.parts; ++part) {
            sum += __ldg(partials_ + static_cast<long long>(part) * pixels_ + pixel);
        }
        return sum;
    }

    CAM_INLINE float normalized(float value) const {
        if (!finite_) return 0;
        if (call_.normalization == normalization_none) return value;
        // Not times 1 / span, which overflows for a subnormal span.
        return span_ > 0 ? (value - low_) / span_ : 0.0f;
    }

    static CAM_INLINE void exchange(float& low, float& high, float& bad, float low2, float high2, float bad2) {
        low = low < low2 ? low : low2;
        high = high > high2 ? high : high2;
        bad = bad > bad2 ? bad : bad2;
    }

    static CAM_INLINE void reduce(float* extremes, float& low, float& high, float& bad) {
#pragma unroll
        for (int offset = warp_threads / 2; offset > 0; offset /= 2) {
            exchange(low, high, bad, __shfl_xor_sync(all_lanes, low, offset), __shfl_xor_sync(all_lanes, high, offset),
                     __shfl_xor_sync(all_lanes, bad, offset));
        }
        if (lane() == 0) {
            extremes[3 * warp()] = low;
            extremes[3 * warp() + 1] = high;
            extremes[3 * warp() + 2] = bad;
        }
        __syncthreads();
        for (int w = 0; w < warps(); ++w) {
            exchange(low, high, bad, extremes[3 * w], extremes[3 * w + 1], extremes[3 * w + 2]);
        }
    }

    // Every thread adds the warps' totals in order.
    static CAM_INLINE float positive_share(float* found, float (&totals)[2]) {
#pragma unroll
        for (int offset = warp_threads / 2; offset > 0; offset /= 2) {
            totals[0] += __shfl_xor_sync(all_lanes, totals[0], offset);
            totals[1] += __shfl_xor_sync(all_lanes, totals[1], offset);
        }
        if (lane() == 0) {
            found[2 * warp()] = totals[0];
            found[2 * warp() + 1] = totals[1];
        }
        __syncthreads();
        double positive = 0;
        double negative = 0;
        for (int w = 0; w < warps(); ++w) {
            // A sum beyond float32's range counts as its largest number.
            positive += is_finite(found[2 * w]) ? found[2 * w] : largest_float;
            negative += is_finite(found[2 * w + 1]) ? found[2 * w + 1] : largest_float;
        }
        return positive > 0 ? static_cast<float>(positive / (positive + negative)) : 0.0f;
    }

    const ViewCall& call_;
    float* cache_;
    int pixels_;
    const float* partials_;
    float low_;
    float span_;
    float evidence_;
    bool finite_;
};

constexpr int drawn_at_once = 4;  // pixels per thread: one 16-byte store

CAM_INLINE void interpolate(const ViewCall& call, const ViewMemory& memory, const MapValues& values, int y, int x,
                            int count, float (&heat)[drawn_at_once]) {
    const Between row = memory.down[y];
    const int top = row.low * call.map_width;
    const int bottom = least(row.low + 1, call.map_height - 1) * call.map_width;
#pragma unroll
    for (int i = 0; i < drawn_at_once; ++i) {
        const Between column = memory.across[x + (i < count ? i : 0)];
        const int left = column.low;
        const int right = least(left + 1, call.map_width - 1);
        const float top_left = values.at(top + left);
        const float bottom_left = values.at(bottom + left);
        const float above = top_left + column.fraction * (values.at(top + right) - top_left);
        const float below = bottom_left + column.fraction * (values.at(bottom + right) - bottom_left);
        heat[i] = above + row.fraction * (below - above);
    }
}

// round((1 - alpha) * pixel + alpha * colour), ties to even, in float64 like the specification: both products are
// precomputed, so they are rounded before they are added.
CAM_INLINE unsigned blend(const ViewMemory& memory, unsigned pixel, int color, int channel) {
    return static_cast<unsigned>(__double2int_rn(__dadd_rn(memory.kept[pixel], memory.tints[color * 3 + channel])));
}

CAM_INLINE int color_of(float value) {
    const float clipped = value > 0 ? (value < 1 ? value : 1.0f) : 0.0f;
    return __float2int_rn(__fmul_rn(255.0f, clipped));
}

CAM_INLINE void draw(const ViewMemory& memory, const unsigned char* pixels, unsigned char* overlay, int count, bool whole,
                     const float (&heat)[drawn_at_once]) {
    int colors[drawn_at_once];
#pragma unroll
    for (int i = 0; i < drawn_at_once; ++i) colors[i] = color_of(heat[i]);
    if (whole) {
        const unsigned* const source = reinterpret_cast<const unsigned*>(pixels);
        unsigned* const target = reinterpret_cast<unsigned*>(overlay);
#pragma unroll
        for (int word = 0; word < 3; ++word) {
            const unsigned bytes = __ldg(source + word);
            unsigned blended = 0;
#pragma unroll
            for (int b = 0; b < 4; ++b) {
                const int byte = word * 4 + b;
                blended |= blend(memory, bytes >> (8 * b) & 0xff, colors[byte / 3], byte % 3) << (8 * b);
            }
            target[word] = blended;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < drawn_at_once; ++i) {
        for (int channel = 0; i < count && channel < 3; ++channel) {
            overlay[i * 3 + channel] =
                static_cast<unsigned char>(blend(memory, pixels[i * 3 + channel], colors[i], channel));
        }
    }
}

CAM_INLINE void view(const ViewCall& call) {
    const ViewMemory memory(call);
    const int map = static_cast<int>(blockIdx.x) / call.tiles;
    const int tile = static_cast<int>(blockIdx.x) % call.tiles;
    const int first_row = tile / call.tiles_across * call.tile_rows;
    const int first_column = tile % call.tiles_across * call.tile_columns;
    const int rows = least(call.tile_rows, call.height - first_row);
    const int columns = least(call.tile_columns, call.width - first_column);
    for (int x = thread(); x < columns; x += threads()) {
        memory.across[x] = between(first_column + x, call.map_width, call.width);
    }
    for (int y = thread(); y < rows; y += threads()) {
        memory.down[y] = between(first_row + y, call.map_height, call.height);
    }
    if (call.overlays) {
        const double kept = 1 - call.alpha;
        for (int i = thread(); i < 256; i += threads()) memory.kept[i] = __dmul_rn(kept, i);
        for (int i = thread(); i < 768; i += threads()) memory.tints[i] = __dmul_rn(call.alpha, call.palette[i]);
    }
    const MapValues values(call, memory, map);  // also waits for the tables

    float* const target = call.maps + static_cast<long long>(map) * values.pixels();
    const long long step = static_cast<long long>(call.tiles) * threads();
    for (long long p = static_cast<long long>(tile) * threads() + thread(); p < values.pixels(); p += step) {
        target[p] = values.at(static_cast<int>(p));
    }
    if (tile == 0 && thread() == 0) {
        call.finite[map] = values.finite();
        call.evidence[map] = values.finite() ? values.evidence() : 0.0f;
    }
    if (rows <= 0 || columns <= 0) return;

    const bool aligned = call.width % drawn_at_once == 0;
    const int across = (columns + drawn_at_once - 1) / drawn_at_once;
    for (int i = thread(); i < rows * across; i += threads()) {
        const int y = i / across;
        const int x = i % across * drawn_at_once;
        const int count = least(drawn_at_once, columns - x);
        float heat[drawn_at_once];
        interpolate(call, memory, values, y, x, count, heat);
        const long long pixel = static_cast<long long>(first_row + y) * call.width + first_column + x;
        const long long size = static_cast<long long>(call.height) * call.width;
        if (call.heatmaps) {
            float* const heatmap = call.heatmaps + map * size + pixel;
            if (aligned) {
                *reinterpret_cast<float4*>(heatmap) = float4{heat[0], heat[1], heat[2], heat[3]};
            } else {
#pragma unroll
                for (int e = 0; e < drawn_at_once; ++e) {
                    if (e < count) heatmap[e] = heat[e];
                }
            }
        }
        if (call.overlays) {
            draw(memory, call.images + (map / call.image_maps * size + pixel) * 3,
                 call.overlays + (map * size + pixel) * 3, count, aligned, heat);
        }
    }
}

// Around the network.

struct PrepareCall {
    const unsigned char* images;  // (images, pixels, channels)
    float* input;                 // (images, pixels, channels), or (images, channels, pixels)
    long long values;             // in all images
    long long pixels;             // in one image
    int channels;
    int channels_last;
    int reversed_order;
    float mean[3];   // in the network's channel order
    float scale[3];
};

// A thread computes four adjacent values of the input.
CAM_INLINE void prepare(const PrepareCall& call) {
    constexpr int count = 4;
    const long long first = (static_cast<long long>(blockIdx.x) * threads() + thread()) * count;
    if (first >= call.values) return;
    float values[count];
#pragma unroll
    for (int e = 0; e < count; ++e) {
        const long long at = first + e < call.values ? first + e : first;
        const long long image_size = call.pixels * call.channels;
        const int channel = static_cast<int>(call.channels_last ? at % call.channels : at % image_size / call.pixels);
        const long long pixel = call.channels_last ? at / call.channels
                                                   : at / image_size * call.pixels + at % call.pixels;
        const int source = call.reversed_order ? call.channels - 1 - channel : channel;
        const float value = __ldg(call.images + pixel * call.channels + source);
        values[e] = __fmul_rn(__fsub_rn(value, call.mean[channel]), call.scale[channel]);
    }
    if (first + count <= call.values) {
        *reinterpret_cast<float4*>(call.input + first) = float4{values[0], values[1], values[2], values[3]};
        return;
    }
#pragma unroll
    for (int e = 0; e < count; ++e) {
        if (first + e < call.values) call.input[first + e] = values[e];
    }
}

struct CheckCall {
    const float* rows;  // (rows, columns)
    int* finite;        // (rows)
    long long columns;
};

// One block per row.
CAM_INLINE void check_rows(const CheckCall& call) {
    const float* const row = call.rows + blockIdx.x * call.columns;
    float bad[1] = {0};
    if (call.columns % 4 == 0) {
        for (long long i = thread() * 4; i < call.columns; i += threads() * 4) {
            Pack<float, 4> pack;
            pack.load(row + i);
            float values[4];
            pack.unpack(values);
#pragma unroll
            for (int e = 0; e < 4; ++e) bad[0] += is_finite(values[e]) ? 0.0f : 1.0f;
        }
    } else {
        for (long long i = thread(); i < call.columns; i += threads()) bad[0] += is_finite(__ldg(row + i)) ? 0.0f : 1.0f;
    }
    float* const found = shared_floats();
    const float total = sum_over_lanes(bad);
    if (lane() == 0) found[warp()] = total;
    __syncthreads();
    if (thread() != 0) return;
    float all = 0;
    for (int w = 0; w < warps(); ++w) all += found[w];
    call.finite[blockIdx.x] = all == 0;
}

// The list of kernels: name, structure, minimum resident blocks per multiprocessor, body.
// 4 blocks mean 64 registers per thread and 32 warps, 3 mean 80 and 24, 2 mean 128 and 16: with four or more 16-byte
// loads in flight per thread, that is at least 32 KiB, more than a multiprocessor's bandwidth times latency requires.

#define CAM_FOR_ANY(X)                                                        \
    X(cam_view, ViewCall, 4, view)                                            \
    X(cam_prepare, PrepareCall, 4, prepare)                                   \
    X(cam_check_rows, CheckCall, 4, check_rows)                               \
    X(cam_channel_any_first_4, SumCall, 2, sum_first<false, Any, 1, 4>)       \
    X(cam_channel_any_last_4, SumCall, 2, sum_last<false, Any, 1, 4>)         \
    X(cam_pooled_any_first_4, SumCall, 2, sum_first<true, Any, 1, 4>)         \
    X(cam_pooled_any_last_4, SumCall, 2, sum_last<true, Any, 1, 4>)           \
    X(cam_element_any_first_4, SumCall, 2, element_first<Any, 1, 4>)          \
    X(cam_element_any_last_4, SumCall, 2, element_last<Any, 1, 4>)

#define CAM_FOR_TYPE(X, name, T, Count)                                              \
    X(cam_channel_##name##_first_1, SumCall, 4, sum_first<false, T, Count, 1>)       \
    X(cam_channel_##name##_first_4, SumCall, 2, sum_first<false, T, Count, 4>)       \
    X(cam_channel_##name##_first_8, SumCall, 2, sum_first<false, T, 4, 8>)           \
    X(cam_channel_##name##_first_16, SumCall, 2, sum_first<false, T, 4, 16>)         \
    X(cam_channel_##name##_last_1, SumCall, 4, sum_last<false, T, Count, 1>)         \
    X(cam_channel_##name##_last_4, SumCall, 3, sum_last<false, T, Count, 4>)         \
    X(cam_channel_##name##_last_16, SumCall, 2, sum_last<false, T, 4, 16>)           \
    X(cam_pooled_##name##_first_4, SumCall, 2, sum_first<true, T, Count, 4>)         \
    X(cam_pooled_##name##_last_4, SumCall, 2, sum_last<true, T, Count, 4>)           \
    X(cam_element_##name##_first_1, SumCall, 3, element_first<T, Count, 1>)          \
    X(cam_element_##name##_first_4, SumCall, 2, element_first<T, Count, 4>)          \
    X(cam_element_##name##_last_1, SumCall, 2, element_last<T, Count, 1>)            \
    X(cam_element_##name##_last_4, SumCall, 2, element_last<T, Count, 4>)

#define CAM_FOR_FLOAT32(X) CAM_FOR_TYPE(X, float32, float, 4)
#define CAM_FOR_FLOAT16(X) CAM_FOR_TYPE(X, float16, Half, 8)
#define CAM_FOR_BFLOAT16(X) CAM_FOR_TYPE(X, bfloat16, Bfloat, 8)

#if !defined(CAM_PART)
#define CAM_FOR_EACH_KERNEL(X) CAM_FOR_ANY(X) CAM_FOR_FLOAT32(X) CAM_FOR_FLOAT16(X) CAM_FOR_BFLOAT16(X)
#elif CAM_PART == CAM_ANY
#define CAM_FOR_EACH_KERNEL(X) CAM_FOR_ANY(X)
#elif CAM_PART == CAM_FLOAT32
#define CAM_FOR_EACH_KERNEL(X) CAM_FOR_FLOAT32(X)
#elif CAM_PART == CAM_FLOAT16
#define CAM_FOR_EACH_KERNEL(X) CAM_FOR_FLOAT16(X)
#else
#define CAM_FOR_EACH_KERNEL(X) CAM_FOR_BFLOAT16(X)
#endif

#define CAM_DEFINE_KERNEL(name, Call, blocks, ...) \
    extern "C" __global__ void __launch_bounds__(most_threads, blocks) name(const __grid_constant__ Call call) { __VA_ARGS__(call); }

CAM_FOR_EACH_KERNEL(CAM_DEFINE_KERNEL)
