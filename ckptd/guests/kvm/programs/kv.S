# kv: a store that answers requests on the console. Numbers are eight lower-case hex digits.
#
#   S iiiiiiii kkkkkkkk vvvvvvvv    set; i is the request's number, the client's choice
#   G iiiiiiii kkkkkkkk             get
#   = iiiiiiii kkkkkkkk vvvvvvvv nnnnnnnn       reply: value, and how many times it was set
#   ! iiiiiiii                      no such request, or no such key; ! -------- where there is not even a number
#
# Key k lives in page k mod pages, entry k / pages: 16 bytes, {value, sets, k + 1, 0}, 256 entries a page. An entry that
# is another key's is a fault.
#
# A request is fetched, done and answered under the lock: requests are atomic, and replies come in their order.
#
#   %ebp  this vCPU's block         %ebx  its line buffer: u32 length, then the line; the reply takes its place

    .include "common.inc"

    .set ENTRIES, 256
    .set SET_LENGTH, 29
    .set GET_LENGTH, 20
    .set LINE, 4                        # in the line buffer

    .set ID, OWN                        # of the last request
    .set KEY, OWN + 4
    .set VALUE, OWN + 8
    .set SETS, OWN + 12
    .set IN_PAGE, OWN + 16

# Eight digits at (%esi) become %eax; to `bad` if they are none. Clobbers %ecx, %edx, %esi.
.macro get_digits bad
    xorl    %eax, %eax
    movl    $8, %ecx
1:  movzbl  (%esi), %edx
    subl    $'0', %edx
    cmpl    $10, %edx
    jb      2f
    subl    $'a' - '0', %edx
    cmpl    $6, %edx
    jae     \bad
    addl    $10, %edx
2:  shll    $4, %eax
    orl     %edx, %eax
    incl    %esi
    decl    %ecx
    jnz     1b
.endm

_start:
    find_block
    find_line %ebx

next:
    acquire
    movl    %ebx, %eax
    latch
    command FETCH
    cmpl    $0, (%ebx)
    je      nothing

    cmpl    $10, (%ebx)
    jb      nameless
    cmpb    $' ', LINE + 1(%ebx)
    jne     nameless
    leal    LINE + 2(%ebx), %esi
    get_digits nameless
    movl    %eax, ID(%ebp)

    cmpb    $'G', LINE(%ebx)
    je      get
    cmpb    $'S', LINE(%ebx)
    jne     bad
    cmpl    $SET_LENGTH, (%ebx)
    jne     bad
    cmpb    $'\n', LINE + 28(%ebx)
    jne     bad
    cmpb    $' ', LINE + 19(%ebx)
    jne     bad
    leal    LINE + 20(%ebx), %esi
    get_digits bad
    movl    %eax, VALUE(%ebp)
    jmp     find
get:
    cmpl    $GET_LENGTH, (%ebx)
    jne     bad
    cmpb    $'\n', LINE + 19(%ebx)
    jne     bad

find:
    cmpb    $' ', LINE + 10(%ebx)
    jne     bad
    leal    LINE + 11(%ebx), %esi
    get_digits bad
    movl    %eax, KEY(%ebp)
    xorl    %edx, %edx
    divl    PAGES
    cmpl    $ENTRIES, %eax
    jae     bad
    movl    %edx, IN_PAGE(%ebp)
    movl    %eax, %edi
    shll    $4, %edi
    find_area
    shll    $12, %edx
    addl    (%eax), %edx
    addl    %edx, %edi                  # the entry

    movl    KEY(%ebp), %eax
    incl    %eax
    cmpl    $0, 4(%edi)
    jne     used
    cmpl    $0, 8(%edi)
    jne     wrong
    jmp     do
used:
    cmpl    %eax, 8(%edi)
    jne     wrong
do:
    cmpb    $'S', LINE(%ebx)
    jne     answer
    movl    VALUE(%ebp), %ecx
    movl    %ecx, (%edi)
    incl    4(%edi)
    movl    %eax, 8(%edi)

answer:
    movl    (%edi), %eax
    movl    %eax, VALUE(%ebp)
    movl    4(%edi), %eax
    movl    %eax, SETS(%ebp)
    movl    %ebx, %edi
    put     '='
    put     ' '
    movl    ID(%ebp), %eax
    put_digits 8
    put     ' '
    movl    KEY(%ebp), %eax
    put_digits 8
    put     ' '
    movl    VALUE(%ebp), %eax
    put_digits 8
    put     ' '
    movl    SETS(%ebp), %eax
    put_digits 8
    jmp     reply

bad:
    movl    %ebx, %edi
    put     '!'
    put     ' '
    movl    ID(%ebp), %eax
    put_digits 8
    jmp     reply

nameless:
    movl    %ebx, %edi
    put     '!'
    put     ' '
    movl    $0x2D2D2D2D, (%edi)         # ----
    movl    $0x2D2D2D2D, 4(%edi)
    addl    $8, %edi

reply:
    put     '\n'
    movl    %ebx, %esi
    transmit
    incl    DONE(%ebp)
    release
    command MARK
    jmp     next

nothing:
    release
    command WAIT
    command MARK
    jmp     next

wrong:
    fault   IN_PAGE(%ebp)

    digits_table
