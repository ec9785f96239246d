# patterns: every page says what it is, and each vCPU checks what it left before it writes anew.
#
# vCPU v owns the pages p with p mod vcpus = v and goes round them. A page's header is four u32, page number, round,
# vCPU and checksum, at offset 0 and again at offset 4080: a torn page has two that differ.
#
#   key      = rol(round * K2, 13) + vcpu * K3              the same for all pages of a round
#   checksum = rol((page * K1) xor key, 15) * K4
#
#   %edi  the next page             %esi  its number                    %ecx  its round, from 1
#   %ebx  this vCPU                 %ebp  this vCPU's block             %edx  pages left in the batch
#
# Its line: the round. A vCPU that owns no page marks empty batches, with round 0.

    .include "common.inc"

    .set K1, 0x9E3779B1
    .set K2, 0x85EBCA6B
    .set K3, 0xC2B2AE35
    .set K4, 0x27D4EB2F

    .set CURSOR, OWN                    # %edi, %esi and %ecx, as they are at the mark
    .set NUMBER, OWN + 4
    .set ROUND, OWN + 8
    .set KEY, OWN + 12                  # of this round
    .set OLD_KEY, OWN + 16              # of the one before, 0 in the first
    .set AREA, OWN + 20                 # entry of the area that the next page is in
    .set AREA_END, OWN + 24             # the first page number after it
    .set STRIDE, OWN + 28               # from a page of this vCPU to its next one, in bytes

_start:
    movl    %eax, %ebx
    find_block
    start_lines
    xorl    %ecx, %ecx
    cmpl    PAGES, %ebx
    jae     idle
    movl    VCPUS, %eax
    shll    $12, %eax
    movl    %eax, STRIDE(%ebp)
    movl    BATCH, %edx

round:
    incl    %ecx
    movl    %ebx, %esi
    movl    KEY(%ebp), %eax
    movl    %eax, OLD_KEY(%ebp)
    imull   $K2, %ecx, %eax
    roll    $13, %eax
    movl    %eax, KEY(%ebp)
    imull   $K3, %ebx, %eax
    addl    %eax, KEY(%ebp)
    movl    $AREAS - 8, AREA(%ebp)
    movl    $0, AREA_END(%ebp)

area:
    cmpl    PAGES, %esi
    jae     round
    addl    $8, AREA(%ebp)
    movl    AREA(%ebp), %eax
    movl    %esi, %edi
    subl    AREA_END(%ebp), %edi
    shll    $12, %edi
    addl    (%eax), %edi
    movl    4(%eax), %eax
    addl    %eax, AREA_END(%ebp)
    cmpl    AREA_END(%ebp), %esi
    jae     area
    testl   %edx, %edx                  # the batch may have ended with the last area
    jz      mark

page:
    cmpl    $1, %ecx
    je      write
    imull   $K1, %esi, %eax
    xorl    OLD_KEY(%ebp), %eax
    roll    $15, %eax
    imull   $K4, %eax, %eax
    cmpl    %eax, 12(%edi)
    jne     wrong
    cmpl    %eax, 4092(%edi)
    jne     wrong
    leal    -1(%ecx), %eax
    cmpl    %eax, 4(%edi)
    jne     wrong
    cmpl    %eax, 4084(%edi)
    jne     wrong
    cmpl    %esi, (%edi)
    jne     wrong
    cmpl    %esi, 4080(%edi)
    jne     wrong
    cmpl    %ebx, 8(%edi)
    jne     wrong
    cmpl    %ebx, 4088(%edi)
    jne     wrong

write:
    imull   $K1, %esi, %eax
    xorl    KEY(%ebp), %eax
    roll    $15, %eax
    imull   $K4, %eax, %eax
    movl    %esi, (%edi)
    movl    %ecx, 4(%edi)
    movl    %ebx, 8(%edi)
    movl    %eax, 12(%edi)
    movl    %esi, 4080(%edi)
    movl    %ecx, 4084(%edi)
    movl    %ebx, 4088(%edi)
    movl    %eax, 4092(%edi)

    decl    %edx
    addl    VCPUS, %esi
    addl    STRIDE(%ebp), %edi
    cmpl    AREA_END(%ebp), %esi
    jae     area
    testl   %edx, %edx
    jnz     page

mark:
    movl    %edi, CURSOR(%ebp)
    movl    %esi, NUMBER(%ebp)
    movl    %ecx, ROUND(%ebp)
    count_batch silent
    movl    %ecx, %ebx
    say     'P'
    movl    CURSOR(%ebp), %edi
    movl    NUMBER(%ebp), %esi
    movl    ROUND(%ebp), %ecx
    leal    -VCPU_BLOCKS(%ebp), %ebx
    shrl    $6, %ebx
silent:
    command MARK
    movl    BATCH, %edx
    jecxz   idle
    jmp     page

idle:
    command WAIT
    jmp     mark

wrong:
    fault   %esi

    digits_table
