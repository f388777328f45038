// What ggml's Vulkan backend needs, and Vulkan's headers and loader in Debian 12 (1.3.239) lack:
// - types of an extension that only debugging uses, laid out as in the specification (VK_EXT_layer_settings);
// - functions of extensions, which that loader does not export but finds by name (vulkan_compat.cpp).
#pragma once
#ifdef __cplusplus
#include <cstdint>
#include <vector>

#include <vulkan/vulkan.hpp>

#ifndef VK_EXT_layer_settings
namespace VULKAN_HPP_NAMESPACE {

enum class LayerSettingTypeEXT { eBool32 = 0 };

struct LayerSettingEXT {
    const char *layer;
    const char *setting;
    LayerSettingTypeEXT type;
    uint32_t n_values;
    const void *values;
};

struct LayerSettingsCreateInfoEXT {
    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> &settings)
        : n_settings(uint32_t(settings.size())), settings(settings.data()) {}

    StructureType type = StructureType(1000496000);
    const void *next = nullptr;
    uint32_t n_settings;
    const LayerSettingEXT *settings;
};

} // namespace VULKAN_HPP_NAMESPACE
#endif
#endif
