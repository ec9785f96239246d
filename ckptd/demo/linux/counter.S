# counter: each line, whatever it says, is answered with the next number of one counter; the first is 1.
#
# The counter is in memory that all connections share and nowhere else: if the guest's memory is put back to what it was,
# so is the counter, and a number comes twice or is missing.

    .include "common.inc"
    .set PORT, COUNTER_PORT

_start:
    memory  $PAGE, SHARED
    movq    %rax, %r15
    jmp     serve

answer:
    movl    $1, %eax
    lock xaddq %rax, (%r15)
    incq    %rax
    call    put_decimal
    put_byte '\n'
    ret

    .include "server.inc"
