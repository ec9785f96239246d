# dirtier: writes one word in each page of a list, passes a mark, and does the same again.
#
# What it shall do is in the boot block, where the bench has put it (harvest.py): u32 address of the list, u32 entries,
# u32 value. The list is of u32 addresses. Nothing else is written, so what the log reports is what the list names.
#
#   %esi  the next entry            %ecx  entries left                  %ebx  the value

    .include "common.inc"

    .set LIST, BOOT_BLOCK
    .set ENTRIES, BOOT_BLOCK + 4
    .set VALUE, BOOT_BLOCK + 8

_start:
    movl    LIST, %esi
    movl    ENTRIES, %ecx
    movl    VALUE, %ebx
    jecxz   mark

page:
    movl    (%esi), %eax
    movl    %ebx, (%eax)
    addl    $4, %esi
    decl    %ecx
    jnz     page

mark:
    command MARK
    jmp     _start
