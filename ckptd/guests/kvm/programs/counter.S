# counter: each vCPU adds 1 to a u32 of its own in each of the first pages, over and over.
#
# vCPU v's counter is at byte 64 v of a page; the pages are the first 1,024, or all if there are fewer.
#
#   %edi  the next counter          %esi  pages left in this area       %ecx  pages left in the round after this area
#   %ebx  the next area's entry     %ebp  this vCPU's block             %eax  pages left in the batch
#
# Its line: the count that its first page has.

    .include "common.inc"

    .set MOST, 1024

    .set CURSOR, OWN                    # %edi, %esi, %ecx and %ebx, as they are at the mark
    .set IN_AREA, OWN + 4
    .set IN_ROUND, OWN + 8
    .set NEXT_AREA, OWN + 12

_start:
    find_block
    start_lines
    movl    BATCH, %eax

round:
    movl    $AREAS, %ebx
    movl    PAGES, %ecx
    cmpl    $MOST, %ecx
    jbe     area
    movl    $MOST, %ecx

area:
    movl    4(%ebx), %esi
    cmpl    %ecx, %esi
    jbe     1f
    movl    %ecx, %esi
1:  subl    %esi, %ecx
    movl    (%ebx), %edi
    leal    -VCPU_BLOCKS(%edi, %ebp), %edi
    addl    $8, %ebx
    testl   %eax, %eax                  # the batch may have ended with the last area
    jz      mark

page:
    incl    (%edi)
    addl    $PAGE, %edi
    decl    %esi
    jz      area_done
    decl    %eax
    jnz     page

mark:
    movl    %edi, CURSOR(%ebp)
    movl    %esi, IN_AREA(%ebp)
    movl    %ecx, IN_ROUND(%ebp)
    movl    %ebx, NEXT_AREA(%ebp)
    count_batch silent
    movl    AREAS, %ebx
    movl    -VCPU_BLOCKS(%ebx, %ebp), %ebx
    say     'C'
    movl    CURSOR(%ebp), %edi
    movl    IN_AREA(%ebp), %esi
    movl    IN_ROUND(%ebp), %ecx
    movl    NEXT_AREA(%ebp), %ebx
silent:
    command MARK
    movl    BATCH, %eax
    jmp     page

area_done:
    decl    %eax
    testl   %ecx, %ecx
    jnz     area
    jmp     round

    digits_table
