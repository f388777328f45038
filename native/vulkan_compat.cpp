// See vulkan_compat.h. A loader that exports these functions has them called through it, by the names here all the same.
#include <vulkan/vulkan.h>

namespace {

template <class Function> Function find(VkDevice device, const char *name) {
    return reinterpret_cast<Function>(vkGetDeviceProcAddr(device, name));
}

} // namespace

extern "C" {

__attribute__((visibility("hidden"))) VkResult
vkGetMemoryHostPointerPropertiesEXT(VkDevice device, VkExternalMemoryHandleTypeFlagBits type, const void *pointer,
                                    VkMemoryHostPointerPropertiesEXT *properties) {
    const auto function = find<PFN_vkGetMemoryHostPointerPropertiesEXT>(device, "vkGetMemoryHostPointerPropertiesEXT");
    return function ? function(device, type, pointer, properties) : VK_ERROR_EXTENSION_NOT_PRESENT;
}

__attribute__((visibility("hidden"))) VkResult
vkGetPipelineExecutableStatisticsKHR(VkDevice device, const VkPipelineExecutableInfoKHR *info, uint32_t *count,
                                     VkPipelineExecutableStatisticKHR *statistics) {
    const auto function = find<PFN_vkGetPipelineExecutableStatisticsKHR>(device, "vkGetPipelineExecutableStatisticsKHR");
    return function ? function(device, info, count, statistics) : VK_ERROR_EXTENSION_NOT_PRESENT;
}

} // extern "C"
