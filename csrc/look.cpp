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

}  // namespace

// Writes each tensor's address, and its elements or -1 as Looks in src/collage/kernels/looking.py says. `view`: torch's
// dltensor_from_py_object_no_sync; `item`: PyList_GetItem; `example`: a tensor or null. Returns 0, or 1 where one of the two
// failed and has set Python's error.
EXPORT int collage_look(int (*view)(void *, View *), void *(*item)(void *, intptr_t), void *tensors, int64_t count,
                        void *example, uint64_t *addresses, int64_t *sizes) {
    View wanted{}, found{};
    if (example && view(example, &wanted)) return 1;
    for (int64_t i = 0; i < count; i++) {
        void *tensor = item(tensors, i);
        if (!tensor || view(tensor, &found)) return 1;
        addresses[i] = (uint64_t)found.data + found.offset;
        sizes[i] = example && !found.like(wanted) ? -1 : found.in_order();
    }
    return 0;
}
