/*
 * A guest without an operating system: 32-bit protected mode, no paging, no interrupts, no devices but COM1.
 *
 * It stamps the pages from 2 MiB to the end of memory (at most to 3 GiB) in a pseudo-random order, forever, so that
 * a dirty log can be tested against KVM's mapping of guest memory where no stock kernel runs. Under KVM and TCG alike.
 *
 * Every page it writes gets, at offset 0: "VMDR", page number, low and high half of the write's number (from 0); the same
 * 16 bytes at offset 4080. The order of a round, which visits every page once: page = (visit * 0x9E3779B1 + round * 0x85EBCA6B)
 * mod pages', pages' being the largest power of two that fits (an odd factor then visits each page once).
 *
 * Command line (multiboot):  pause=N   spins N PAUSE instructions after every page (default 0: as fast as it can)
 * Serial port, 8 hex digits:  "pages XXXXXXXX" once, then "writes XXXXXXXX" after every 4,096 pages.
 */
#define MAGIC 0x1BADB002
#define FLAGS 0x00000003                /* align modules, give memory size */
#define COM1 0x3F8
#define FIRST_PAGE 512                  /* 2 MiB */
#define LAST_MIB 3072                   /* below the PCI hole of every machine type used */

        .section .multiboot, "a"
        .align 4
        .long MAGIC, FLAGS, -(MAGIC + FLAGS)

        .text
        .code32
        .globl start
start:
        cli
        cld
        movl $stack_end, %esp
        movl %ebx, info

        /* COM1: 115200 8n1, FIFO on. */
        movw $(COM1 + 1), %dx ; movb $0, %al    ; outb %al, %dx
        movw $(COM1 + 3), %dx ; movb $0x80, %al ; outb %al, %dx
        movw $(COM1 + 0), %dx ; movb $1, %al    ; outb %al, %dx
        movw $(COM1 + 1), %dx ; movb $0, %al    ; outb %al, %dx
        movw $(COM1 + 3), %dx ; movb $3, %al    ; outb %al, %dx
        movw $(COM1 + 2), %dx ; movb $0xC7, %al ; outb %al, %dx

        /* Pages: mem_upper is in KiB and begins at 1 MiB. */
        movl info, %ebx
        movl 8(%ebx), %eax
        shrl $2, %eax                   /* pages above 1 MiB */
        subl $256, %eax                 /* pages above 2 MiB */
        cmpl $((LAST_MIB - 2) * 256), %eax
        jbe 1f
        movl $((LAST_MIB - 2) * 256), %eax
1:      bsrl %eax, %ecx
        movl $1, %eax
        shll %cl, %eax
        movl %eax, pages

        call read_pause
        movl $text_pages, %esi ; call print
        movl pages, %eax ; call print_hex

        /* esi: visit; edi: round; the number of the write in `low`, `high`. */
        xorl %esi, %esi
        xorl %edi, %edi
again:
        movl %esi, %eax
        imull $0x9E3779B1, %eax
        movl %edi, %ebx
        imull $0x85EBCA6B, %ebx
        addl %ebx, %eax
        movl pages, %ebx
        decl %ebx
        andl %ebx, %eax
        addl $FIRST_PAGE, %eax
        movl %eax, %ebx
        shll $12, %ebx                  /* the page's address */
        movl low, %ecx
        movl high, %edx
        movl $0x52444D56, (%ebx)        /* "VMDR" */
        movl %eax, 4(%ebx)
        movl %ecx, 8(%ebx)
        movl %edx, 12(%ebx)
        movl $0x52444D56, 4080(%ebx)
        movl %eax, 4084(%ebx)
        movl %ecx, 4088(%ebx)
        movl %edx, 4092(%ebx)
        addl $1, low
        adcl $0, high

        incl %esi
        cmpl pages, %esi
        jne 2f
        xorl %esi, %esi
        incl %edi
2:      movl spins, %ecx
        testl %ecx, %ecx
        jz 4f
3:      pause
        decl %ecx
        jnz 3b
4:      testl $0xFFF, low
        jnz again
        pushl %esi
        movl $text_writes, %esi ; call print
        movl low, %eax ; call print_hex
        popl %esi
        jmp again

/* Finds "pause=" in the command line and reads the decimal number behind it. */
read_pause:
        movl info, %ebx
        testl $4, (%ebx)
        jz 9f
        movl 16(%ebx), %esi
5:      cmpb $0, (%esi)
        je 9f
        cmpl $0x73756170, (%esi)        /* "paus" */
        jne 6f
        cmpw $0x3D65, 4(%esi)           /* "e=" */
        je 7f
6:      incl %esi
        jmp 5b
7:      addl $6, %esi
        xorl %eax, %eax
8:      movzbl (%esi), %ecx
        subl $'0', %ecx
        cmpl $9, %ecx
        ja 10f
        imull $10, %eax
        addl %ecx, %eax
        incl %esi
        jmp 8b
10:     movl %eax, spins
9:      ret

/* Prints the string at esi. Clobbers eax, edx. */
print:
        lodsb
        testb %al, %al
        jz 12f
        call put
        jmp print
12:     ret

/* Prints eax as 8 hex digits and a line end. Clobbers ecx, edx, ebx. */
print_hex:
        movl %eax, %ebx
        movl $8, %ecx
13:     roll $4, %ebx
        movl %ebx, %eax
        andl $15, %eax
        movb digits(%eax), %al
        call put
        decl %ecx
        jnz 13b
        movb $'\n', %al
        /* falls through */

/* Prints al. Clobbers edx. */
put:
        movb %al, %ah
        movw $(COM1 + 5), %dx
14:     inb %dx, %al
        testb $0x20, %al
        jz 14b
        movb %ah, %al
        movw $COM1, %dx
        outb %al, %dx
        ret

        .data
digits:      .ascii "0123456789ABCDEF"
text_pages:  .asciz "pages "
text_writes: .asciz "writes "
        .align 4
info:        .long 0
pages:       .long 0
spins:       .long 0
low:         .long 0
high:        .long 0

        .bss
        .align 16
        .skip 4096
stack_end:
