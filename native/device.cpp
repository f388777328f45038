// Devices: those that backends found on this machine, and those of rpc-servers.

#include "internal.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "ggml-backend.h"
#include "ggml-rpc.h"
#include "ggml.h"

using namespace trio;

namespace {

enum Use { WEIGHTS = 0, KV_CACHE = 1 };

ggml_backend_dev_t find_device(int32_t index) {
    check(index >= 0 && size_t(index) < ggml_backend_dev_count(), "device index is out of range");
    return ggml_backend_dev_get(size_t(index));
}

// The operation that decides whether a device can be used for a type, with sizes as in models.
ggml_tensor *example(ggml_context *context, Use use, ggml_type type) {
    constexpr int64_t N_EMBD = 4096, N_HEAD = 32, N_HEAD_KV = 8, HEAD_SIZE = 128, N_CELLS = 256, N_ROWS = 32;
    if (use == WEIGHTS) {
        ggml_tensor *weights = ggml_new_tensor_2d(context, type, N_EMBD, N_EMBD);
        return ggml_mul_mat(context, weights, ggml_new_tensor_2d(context, GGML_TYPE_F32, N_EMBD, N_ROWS));
    }
    ggml_tensor *q = ggml_new_tensor_4d(context, GGML_TYPE_F32, HEAD_SIZE, N_ROWS, N_HEAD, 1);
    ggml_tensor *k = ggml_new_tensor_4d(context, type, HEAD_SIZE, N_CELLS, N_HEAD_KV, 1);
    ggml_tensor *v = ggml_new_tensor_4d(context, type, HEAD_SIZE, N_CELLS, N_HEAD_KV, 1);
    ggml_tensor *mask = ggml_new_tensor_4d(context, GGML_TYPE_F16, N_CELLS, N_ROWS, 1, 1);
    return ggml_flash_attn_ext(context, q, k, v, mask, 1.0f, 0.0f, 0.0f);
}

} // namespace

std::vector<ggml_backend_dev_t> trio::find_devices(const int32_t *indices, int32_t n) {
    check(n >= 0 && size_t(n) <= llama_max_devices(), "n_devices is out of range");
    std::vector<ggml_backend_dev_t> devices;
    for (int32_t i = 0; i < n; ++i) {
        ggml_backend_dev_t device = find_device(check_pointer(indices, "devices")[i]);
        check(std::find(devices.begin(), devices.end(), device) == devices.end(), "a device is given twice");
        check(ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_CPU, "layers cannot be put on the CPU device");
        devices.push_back(device);
    }
    return devices;
}

int32_t trio::device_number(ggml_backend_dev_t device) {
    for (size_t index = 0; index < ggml_backend_dev_count(); ++index) {
        if (ggml_backend_dev_get(index) == device) return int32_t(index);
    }
    return -1;
}

bool trio::is_remote(ggml_backend_dev_t device) {
    return std::string(ggml_backend_reg_name(ggml_backend_dev_backend_reg(device))) == "RPC";
}

extern "C" {

int32_t trio_device_count(void) {
    return guard([] { return int32_t(ggml_backend_dev_count()); });
}

int32_t trio_device_get(int32_t index, trio_device *device) {
    return guard([&] {
        check_pointer(device, "device");
        ggml_backend_dev_t native = find_device(index);
        ggml_backend_dev_props props{};
        ggml_backend_dev_get_props(native, &props);
        copy_text(props.name ? props.name : "", device->name, sizeof device->name);
        copy_text(props.description ? props.description : "", device->description, sizeof device->description);
        copy_text(ggml_backend_reg_name(ggml_backend_dev_backend_reg(native)), device->backend, sizeof device->backend);
        copy_text(props.device_id ? props.device_id : "", device->id, sizeof device->id);
        device->type = int32_t(props.type);
        device->is_remote = is_remote(native);
        device->memory_free = props.memory_free;
        device->memory_total = props.memory_total;
        return TRIO_OK;
    });
}

int32_t trio_device_supports(int32_t index, int32_t use, int32_t type) {
    return guard([&] {
        check(use == WEIGHTS || use == KV_CACHE, "use must be 0 or 1");
        check(type >= 0 && type < GGML_TYPE_COUNT && ggml_blck_size(ggml_type(type)) > 0, "there is no such type");
        ggml_backend_dev_t device = find_device(index);
        const ggml_init_params params{ggml_tensor_overhead() * 8, nullptr, true};
        const std::unique_ptr<ggml_context, decltype(&ggml_free)> context(ggml_init(params), ggml_free);
        return int32_t(ggml_backend_dev_supports_op(device, example(context.get(), Use(use), ggml_type(type))));
    });
}

int32_t trio_rpc_add(const char *endpoint, int32_t *first) {
    return guard([&] {
        check_pointer(endpoint, "endpoint");
        check_pointer(first, "first");
        static std::mutex mutex;
        static std::map<std::string, std::pair<int32_t, int32_t>> added;
        std::lock_guard<std::mutex> lock(mutex);
        auto found = added.find(endpoint);
        if (found == added.end()) {
            ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
            if (rpc == nullptr) throw Failure(TRIO_E_LOAD, "the backend rpc was not built or cannot be opened");
            const auto add = reinterpret_cast<decltype(ggml_backend_rpc_add_server) *>(
                ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server"));
            if (add == nullptr) throw Failure(TRIO_E_LOAD, "the backend rpc cannot add servers");
            ggml_backend_reg_t server = add(endpoint);
            if (server == nullptr) throw Failure(TRIO_E_LOAD, "the rpc-server has no devices");
            const auto before = int32_t(ggml_backend_dev_count());
            ggml_backend_register(server);
            const std::pair<int32_t, int32_t> numbers(before, int32_t(ggml_backend_dev_count()) - before);
            found = added.emplace(endpoint, numbers).first;
        }
        *first = found->second.first;
        return found->second.second;
    });
}

} // extern "C"
