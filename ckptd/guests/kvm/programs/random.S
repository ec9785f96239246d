# random: each vCPU changes its slots of pages that chance picks, each time on top of what was there.
#
#   x    = x * 1664525 + 1013904223                         from a mix of seed and vCPU
#   page = (x * pages) >> 32
#
# A slot is the 64 bytes at 64 v of a page, four u32 of it used: sum of all x, xor of all rounds rotated by 16, number
# of writes, round of the last one. A write that is lost stays missing in the first three.
#
#   %esi  x                         %edi  rounds done                   %ecx  rounds left in the batch
#   %ebx  the slot's offset         %ebp  this vCPU's block
#
# Its line: x.

    .include "common.inc"

    .set X, OWN                         # %esi and %edi, as they are at the mark
    .set ROUNDS, OWN + 4

_start:
    find_block
    leal    -VCPU_BLOCKS(%ebp), %ebx
    imull   $0x9E3779B9, %eax, %esi     # the finalizer of MurmurHash3 over seed + v * golden
    addl    SEED, %esi
    movl    %esi, %eax
    shrl    $16, %eax
    xorl    %eax, %esi
    imull   $0x85EBCA6B, %esi, %esi
    movl    %esi, %eax
    shrl    $13, %eax
    xorl    %eax, %esi
    imull   $0xC2B2AE35, %esi, %esi
    movl    %esi, %eax
    shrl    $16, %eax
    xorl    %eax, %esi
    xorl    %edi, %edi
    start_lines

batch:
    movl    BATCH, %ecx

one:
    imull   $1664525, %esi, %esi
    addl    $1013904223, %esi
    incl    %edi
    movl    %esi, %eax
    mull    PAGES
    cmpl    AREAS + 4, %edx
    jae     elsewhere
    shll    $12, %edx
    addl    AREAS, %edx
found:
    movl    %edi, %eax
    roll    $16, %eax
    addl    %esi, (%edx, %ebx)
    xorl    %eax, 4(%edx, %ebx)
    incl    8(%edx, %ebx)
    movl    %edi, 12(%edx, %ebx)
    decl    %ecx
    jnz     one

    movl    %esi, X(%ebp)
    movl    %edi, ROUNDS(%ebp)
    count_batch silent
    movl    %esi, %ebx
    say     'R'
    movl    X(%ebp), %esi
    movl    ROUNDS(%ebp), %edi
    leal    -VCPU_BLOCKS(%ebp), %ebx
    xorl    %ecx, %ecx
silent:
    command MARK
    jmp     batch

elsewhere:
    find_area
    shll    $12, %edx
    addl    (%eax), %edx
    jmp     found

    digits_table
