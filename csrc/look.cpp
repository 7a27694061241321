// Facts about many of Python's tensors in one call, by the C functions that torch publishes for them (DLPack 1.x). They and
// Python's own are handed over as addresses, so that no header of theirs is needed. Python's lock is held.
#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// DLTensor of dlpack.h.
struct View {
    void *data;
    int32_t device_type, device;
    int32_t dims;
    uint8_t code, bits;
    uint16_t lanes;
    const int64_t *shape, *strides;
    uint64_t offset;

    bool like(const View &other) const {
        return device_type == other.device_type && device == other.device && code == other.code && bits == other.bits &&
               lanes == other.lanes;
    }

    // Elements, or -1 where they do not stand one after the other.
    int64_t in_order() const {
        int64_t count = 1;
        bool ordered = true;
        for (int d = dims - 1; d >= 0; d--) {
            ordered = ordered && (shape[d] == 1 || strides[d] == count);
            count *= shape[d];
        }
        return ordered || !count ? count : -1;
    }
};

// Tensors ahead whose records are fetched, and lines of the processor's cache that torch's record of a tensor is in.
constexpr int64_t AHEAD = 8;
constexpr int LINES = 4;

// Inlined, or GCC takes it for a function without effect.
__attribute__((always_inline)) inline void fetch(const uint64_t *records) {
    for (int line = 0; line < LINES; line++) __builtin_prefetch((const char *)records[0] + 64 * line);
    __builtin_prefetch((const char *)records[1] + 16);
}

}  // namespace

// Writes each tensor's address, and its elements or -1 as Looks in src/collage/kernels/looking.py says. `view`: torch's
// dltensor_from_py_object_no_sync; `item`: PyList_GetItem; `example`: a tensor or null. Returns 0, or 1 where one of the two
// failed and has set Python's error. `records`: [tensor] where torch's records of it and of its storage may be, or null; they
// are fetched ahead and not read.
EXPORT int collage_look(int (*view)(void *, View *), void *(*item)(void *, intptr_t), void *tensors, int64_t count,
                        void *example, const uint64_t *records, uint64_t *addresses, int64_t *sizes) {
    View wanted{}, found{};
    if (example && view(example, &wanted)) return 1;
    for (int64_t i = 0; i < count; i++) {
        if (records && i + AHEAD < count) fetch(records + 2 * (i + AHEAD));
        void *tensor = item(tensors, i);
        if (!tensor || view(tensor, &found)) return 1;
        addresses[i] = (uint64_t)found.data + found.offset;
        sizes[i] = example && !found.like(wanted) ? -1 : found.in_order();
    }
    return 0;
}
