// NVML's functions over accuracy/fake_nvml.h, with the signatures and numbers of NVIDIA's nvml.h (NVML API
// Reference Guide), written down once more: tests of fixtures/machine/nvml.cc open it in the place of the driver's.
#include "accuracy/fake_nvml.h"

#include <cstring>

extern "C" {

kvq::FakeGpu fake_gpu;

enum { NVML_SUCCESS = 0, NVML_ERROR_NOT_SUPPORTED = 3, NVML_ERROR_NOT_FOUND = 6, NVML_ERROR_INSUFFICIENT_SIZE = 7 };
typedef struct nvmlDevice_st* nvmlDevice_t;
typedef enum { NVML_CLOCK_GRAPHICS = 0, NVML_CLOCK_SM = 1, NVML_CLOCK_MEM = 2 } nvmlClockType_t;
typedef enum { NVML_TEMPERATURE_GPU = 0 } nvmlTemperatureSensors_t;
typedef enum { NVML_FEATURE_DISABLED = 0, NVML_FEATURE_ENABLED = 1 } nvmlEnableState_t;
typedef struct {
  unsigned long long total, free, used;
} nvmlMemory_t;
typedef struct {
  unsigned int pid;
  unsigned long long usedGpuMemory;
  unsigned int gpuInstanceId, computeInstanceId;
} nvmlProcessInfo_t;

int nvmlInit_v2() { return ++fake_gpu.started, NVML_SUCCESS; }
int nvmlShutdown() { return --fake_gpu.started, NVML_SUCCESS; }

int nvmlDeviceGetHandleByPciBusId_v2(const char* bus_id, nvmlDevice_t* device) {
  if (std::strcmp(bus_id, "0000:0f:00.0") != 0) return NVML_ERROR_NOT_FOUND;
  *device = reinterpret_cast<nvmlDevice_t>(&fake_gpu);
  return NVML_SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned int* count) { return *count = 8, NVML_SUCCESS; }

static bool Known(nvmlDevice_t device) { return device == reinterpret_cast<nvmlDevice_t>(&fake_gpu); }

static int Say(nvmlDevice_t device, bool supported, unsigned int value, unsigned int* out) {
  if (!Known(device) || !supported) return NVML_ERROR_NOT_SUPPORTED;
  *out = value;
  return NVML_SUCCESS;
}

int nvmlDeviceGetClockInfo(nvmlDevice_t device, nvmlClockType_t type, unsigned int* clock) {
  return Say(device, type != NVML_CLOCK_GRAPHICS, type == NVML_CLOCK_SM ? fake_gpu.sm_clock.load() : 3201, clock);
}
int nvmlDeviceGetMaxClockInfo(nvmlDevice_t device, nvmlClockType_t type, unsigned int* clock) {
  return Say(device, type == NVML_CLOCK_SM, 1980, clock);
}
int nvmlDeviceGetTemperature(nvmlDevice_t device, nvmlTemperatureSensors_t sensor, unsigned int* temperature) {
  return Say(device, sensor == NVML_TEMPERATURE_GPU, fake_gpu.temperature, temperature);
}
int nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned int* milliwatts) {
  return Say(device, fake_gpu.has_power, fake_gpu.milliwatts, milliwatts);
}
int nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t device, unsigned int* milliwatts) {
  return Say(device, true, 700000, milliwatts);
}
int nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, unsigned long long* millijoules) {
  if (!Known(device) || !fake_gpu.has_energy) return NVML_ERROR_NOT_SUPPORTED;
  *millijoules = fake_gpu.millijoules;
  return NVML_SUCCESS;
}
int nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t device, unsigned long long* reasons) {
  if (!Known(device) || !fake_gpu.has_event_reasons) return NVML_ERROR_NOT_SUPPORTED;
  *reasons = fake_gpu.clock_reasons;
  return NVML_SUCCESS;
}
int nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t* memory) {
  if (!Known(device)) return NVML_ERROR_NOT_FOUND;
  *memory = {150ull << 30, 149ull << 30, 1ull << 30};
  return NVML_SUCCESS;
}
int nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned int* count, nvmlProcessInfo_t* infos) {
  if (!Known(device) || !fake_gpu.has_processes) return NVML_ERROR_NOT_SUPPORTED;
  const auto& processes = fake_gpu.processes;
  const bool fits = infos != nullptr && *count >= processes.size();
  *count = static_cast<unsigned int>(processes.size());
  if (!fits) return NVML_ERROR_INSUFFICIENT_SIZE;
  for (size_t i = 0; i < processes.size(); ++i) infos[i] = {processes[i].pid, processes[i].bytes, ~0u, ~0u};
  return NVML_SUCCESS;
}
int nvmlSystemGetDriverVersion(char* version, unsigned int length) {
  std::strncpy(version, "580.95.05", length);
  return NVML_SUCCESS;
}
// No nvmlDeviceGetPersistenceMode: as in a library that does not have everything.
int nvmlDeviceGetEccMode(nvmlDevice_t device, nvmlEnableState_t* current, nvmlEnableState_t* pending) {
  if (!Known(device)) return NVML_ERROR_NOT_FOUND;
  *current = NVML_FEATURE_ENABLED, *pending = NVML_FEATURE_DISABLED;
  return NVML_SUCCESS;
}

}  // extern "C"
