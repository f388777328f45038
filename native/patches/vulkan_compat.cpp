// See vulkan_compat.h. Where a newer loader exports these functions too, the plugin still uses the ones here.
#include "ggml-vulkan-types.h"

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

// Writes all the bindings of a descriptor set, not only those that the next shader reads.
//
// ggml writes as many buffers into a set as its next shader reads. The bindings behind them go on naming buffers that
// an earlier shader read, which may have been freed. That is allowed: the specification says that they are not
// accessed. But Mesa's software device, up to 22.3 at least (Debian 12), counts references to every buffer that a set
// names, and the process crashes in one of its threads.
__attribute__((visibility("hidden"))) void vkUpdateDescriptorSets(VkDevice device, uint32_t n_writes,
                                                                  const VkWriteDescriptorSet *writes, uint32_t n_copies,
                                                                  const VkCopyDescriptorSet *copies) {
    thread_local VkDevice last_device = VK_NULL_HANDLE;
    thread_local PFN_vkUpdateDescriptorSets function = nullptr;
    if (device != last_device) {
        function = find<PFN_vkUpdateDescriptorSets>(device, "vkUpdateDescriptorSets");
        last_device = device;
    }
    for (uint32_t i = 0; i < n_writes; ++i) {
        VkWriteDescriptorSet write = writes[i];
        VkDescriptorBufferInfo buffers[MAX_PARAMETER_COUNT];
        const uint32_t n = write.descriptorCount;
        if (write.descriptorType == VK_DESCRIPTOR_TYPE_STORAGE_BUFFER && write.dstBinding == 0 && n > 0 &&
            n < MAX_PARAMETER_COUNT) {
            for (uint32_t binding = 0; binding < MAX_PARAMETER_COUNT; ++binding)
                buffers[binding] = write.pBufferInfo[binding < n ? binding : n - 1];
            write.descriptorCount = MAX_PARAMETER_COUNT;
            write.pBufferInfo = buffers;
        }
        function(device, 1, &write, 0, nullptr);
    }
    if (n_copies > 0) function(device, 0, nullptr, n_copies, copies);
}

} // extern "C"
