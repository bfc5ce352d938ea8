// A profiler of a few lines: prints every range that is pushed and popped, as `+ domain|name|payload` and `- domain`.
#include <nvtx3/nvToolsExt.h>
#include <stdio.h>
#include <string.h>

static nvtxDomainHandle_t domain(const char *name) { return (nvtxDomainHandle_t)strdup(name); }
static nvtxStringHandle_t string(nvtxDomainHandle_t where, const char *text) { return (nvtxStringHandle_t)strdup(text); }

static int push(nvtxDomainHandle_t where, const nvtxEventAttributes_t *event) {
    int numbered = event->payloadType == NVTX_PAYLOAD_TYPE_INT64;
    return fprintf(stderr, "+ %s|%s|%lld\n", (const char *)where, (const char *)event->message.registered,
                   numbered ? (long long)event->payload.llValue : -1);
}

static int pop(nvtxDomainHandle_t where) { return fprintf(stderr, "- %s\n", (const char *)where); }

int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t exports) {
    const NvtxExportTableCallbacks *callbacks = exports(NVTX_ETID_CALLBACKS);
    NvtxFunctionTable table;
    unsigned int size;
    if (!callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size)) return 0;
    *table[NVTX_CBID_CORE2_DomainCreateA] = (NvtxFunctionPointer)domain;
    *table[NVTX_CBID_CORE2_DomainRegisterStringA] = (NvtxFunctionPointer)string;
    *table[NVTX_CBID_CORE2_DomainRangePushEx] = (NvtxFunctionPointer)push;
    *table[NVTX_CBID_CORE2_DomainRangePop] = (NvtxFunctionPointer)pop;
    return 1;
}
