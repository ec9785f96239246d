"""The part of KVM's ABI that we use: ioctl numbers, capabilities, exit reasons and struct layouts, x86-64.

Source: Linux include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h; the section of
Documentation/virt/kvm/api.rst is named beside each group. Knows nothing of how they are used.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

__all__ = ["Cap", "Exit", "MemoryFlag", "io", "ior", "iow", "iowr"]

KVMIO = 0xAE
API_VERSION = 12  # api.rst 4.1: with any other, refuse to run


def io(number: int) -> int:
    """_IO of asm-generic/ioctl.h: bits 31-30 direction, 29-16 size, 15-8 type, 7-0 number."""
    return KVMIO << 8 | number


def iow(number: int, size: int) -> int:
    """_IOW: the kernel reads `size` bytes."""
    return 1 << 30 | size << 16 | KVMIO << 8 | number


def ior(number: int, size: int) -> int:
    """_IOR: the kernel writes `size` bytes."""
    return 2 << 30 | size << 16 | KVMIO << 8 | number


def iowr(number: int, size: int) -> int:
    """_IOWR."""
    return 3 << 30 | size << 16 | KVMIO << 8 | number


# --- of /dev/kvm: api.rst 4.1 to 4.5, 4.46

GET_API_VERSION = io(0x00)
CREATE_VM = io(0x01)
GET_MSR_INDEX_LIST = iowr(0x02, 4)
CHECK_EXTENSION = io(0x03)  # also of a VM, where the answer is that VM's
GET_VCPU_MMAP_SIZE = io(0x04)
GET_SUPPORTED_CPUID = iowr(0x05, 8)

# --- of a VM: api.rst 4.7, 4.8, 4.29, 4.30, 4.35, 4.37, 4.117 and 8.29

CREATE_VCPU = io(0x41)
GET_DIRTY_LOG = iow(0x42, 16)
SET_USER_MEMORY_REGION = iow(0x46, 32)
SET_TSS_ADDR = io(0x47)
SET_IDENTITY_MAP_ADDR = iow(0x48, 8)
SET_CLOCK = iow(0x7B, 48)
GET_CLOCK = ior(0x7C, 48)
ENABLE_CAP = iow(0xA3, 104)
CLEAR_DIRTY_LOG = iowr(0xC0, 24)
RESET_DIRTY_RINGS = io(0xC7)  # the answer is the number of entries that were reset

# --- of a vCPU: api.rst 4.10 to 4.22, 4.31 to 4.34, 4.42 to 4.45, 4.55, 4.56

RUN = io(0x80)
GET_REGS, SET_REGS, REGS_SIZE = ior(0x81, 144), iow(0x82, 144), 144
GET_SREGS, SET_SREGS, SREGS_SIZE = ior(0x83, 312), iow(0x84, 312), 312
GET_MSRS, SET_MSRS = iowr(0x88, 8), iow(0x89, 8)
GET_FPU, SET_FPU, FPU_SIZE = ior(0x8C, 416), iow(0x8D, 416), 416
SET_CPUID2, GET_CPUID2 = iow(0x90, 8), iowr(0x91, 8)
GET_MP_STATE, SET_MP_STATE, MP_STATE_SIZE = ior(0x98, 4), iow(0x99, 4), 4
GET_VCPU_EVENTS, SET_VCPU_EVENTS, VCPU_EVENTS_SIZE = ior(0x9F, 64), iow(0xA0, 64), 64
GET_DEBUGREGS, SET_DEBUGREGS, DEBUGREGS_SIZE = ior(0xA1, 128), iow(0xA2, 128), 128
SET_TSC_KHZ, GET_TSC_KHZ = io(0xA2), io(0xA3)
GET_XSAVE, SET_XSAVE, XSAVE_SIZE = ior(0xA4, 4096), iow(0xA5, 4096), 4096
GET_XCRS, SET_XCRS, XCRS_SIZE = ior(0xA6, 392), iow(0xA7, 392), 392
GET_XSAVE2 = ior(0xCF, 4096)  # writes as many bytes as Cap.XSAVE2 says


class Cap(IntEnum):
    """KVM_CAP_*, for CHECK_EXTENSION and ENABLE_CAP."""

    USER_MEMORY = 3
    SET_TSS_ADDR = 4
    NR_VCPUS = 9
    NR_MEMSLOTS = 10
    MP_STATE = 14
    SET_IDENTITY_MAP_ADDR = 37
    ADJUST_CLOCK = 39
    VCPU_EVENTS = 41
    DEBUGREGS = 50
    XSAVE = 55
    XCRS = 56
    TSC_CONTROL = 60
    GET_TSC_KHZ = 61
    MAX_VCPUS = 66
    IMMEDIATE_EXIT = 136
    MANUAL_DIRTY_LOG_PROTECT2 = 168
    DIRTY_LOG_RING = 192
    XSAVE2 = 208
    DIRTY_LOG_RING_ACQ_REL = 223


MANUAL_PROTECT_ENABLE, MANUAL_INITIALLY_SET = 1, 2  # args[0] of Cap.MANUAL_DIRTY_LOG_PROTECT2, api.rst 7.18


class MemoryFlag(IntFlag):
    """KVM_MEM_* of SET_USER_MEMORY_REGION, api.rst 4.35."""

    LOG_DIRTY_PAGES = 1
    READONLY = 2


class Exit(IntEnum):
    """KVM_EXIT_*: why KVM_RUN returned, api.rst 5."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    DIRTY_RING_FULL = 31


# struct kvm_userspace_memory_region
#     u32 slot | u32 flags | u64 guest_phys_addr | u64 memory_size | u64 userspace_addr
MEMORY_REGION = struct.Struct("<IIQQQ")

# struct kvm_enable_cap
#     u32 cap | u32 flags | u64 args[4] | u8 pad[64]
ENABLE_CAP_ARGS = struct.Struct("<II4Q64x")

# struct kvm_dirty_log                        struct kvm_clear_dirty_log
#     u32 slot | u32 pad | u64 bitmap             u32 slot | u32 num_pages | u64 first_page | u64 bitmap
DIRTY_LOG = struct.Struct("<IIQ")
CLEAR_LOG = struct.Struct("<IIQQ")

# The ring of a vCPU is mapped from the vCPU's descriptor at page 64: struct kvm_dirty_gfn, see trackers/kvm_ring.py.
RING_PAGE_OFFSET = 64
RING_MAX_ENTRIES = 65536

# struct kvm_run, the page that a vCPU shares
#     0  u8 request_interrupt_window | 1  u8 immediate_exit | 8  u32 exit_reason
#     32 union: io     u8 direction | u8 size | u16 port | u32 count | u64 data_offset
#               mmio   u64 phys_addr | u8 data[8] | u32 len | u8 is_write
#               fail_entry        u64 hardware_entry_failure_reason
#               internal.suberror u32
IMMEDIATE_EXIT_AT = 1
EXIT_REASON = struct.Struct("<8xI")
EXIT_IO = struct.Struct("<32xBBHIQ")
EXIT_MMIO = struct.Struct("<32xQ8sIB")
EXIT_FAIL_ENTRY = struct.Struct("<32xQ")
EXIT_INTERNAL = struct.Struct("<32xI")
IO_OUT = 1

# struct kvm_regs
#     rax rbx rcx rdx rsi rdi rsp rbp r8 ... r15 rip rflags
REGS = struct.Struct("<18Q")
REG_NAMES = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
    "rip", "rflags",
)  # fmt: skip

# struct kvm_segment, 24 bytes; sregs begin with cs ds es fs gs ss tr ldt, then gdt and idt (16 bytes each), cr0
#     u64 base | u32 limit | u16 selector | u8 type present dpl db s l g avl unusable padding
SEGMENT = struct.Struct("<QIH10B")
SREGS_CR0_AT = 224
CR0_PE = 1

# struct kvm_msrs: u32 nmsrs | u32 pad | entries of u32 index | u32 reserved | u64 data
MSRS_HEAD = struct.Struct("<II")
MSR_ENTRY = struct.Struct("<IIQ")
MSR_IA32_TSC = 0x10

# struct kvm_msr_list: u32 nmsrs | u32 indices[]
MAX_MSRS = 512

# struct kvm_cpuid2: u32 nent | u32 padding | entries of
#     u32 function | u32 index | u32 flags | u32 eax | u32 ebx | u32 ecx | u32 edx | u32 padding[3]
CPUID_HEAD = struct.Struct("<II")
CPUID_ENTRY = struct.Struct("<7I12x")
MAX_CPUID = 256

# struct kvm_clock_data: u64 clock | u32 flags | u32 pad | u64 realtime | u64 host_tsc | u32 pad[4]
CLOCK = struct.Struct("<QII")
CLOCK_SIZE = 48
