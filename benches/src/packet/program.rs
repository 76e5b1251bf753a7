//! The program that the kernel runs over each frame before it sends it up its
//! stack: it writes the whole frame anew from the template (frames come back from
//! their last journey as they were left, rewritten addresses and all) and puts
//! the flow's number into it.
//!
//! Pure: makes instructions; [`crate::packet::bpf`] loads them. Encoding as in
//! the kernel's `Documentation/bpf/standardization/instruction-set.rst`.

use crate::packet::frame::{FRAME_BYTES, Template};

// Registers. The context comes in the first argument's.
const R0: u8 = 0;
const CONTEXT: u8 = 1;
const DATA: u8 = 2;
const DATA_END: u8 = 3;
const LIMIT: u8 = 4;
const COUNTER: u8 = 5;
const FLOW: u8 = 6;
const SCRATCH: u8 = 7;

/// Arguments of a call.
const ARGUMENT_MAP: u8 = 2;
const ARGUMENT_INDEX: u8 = 3;
/// `bpf_tail_call(context, map, index)`.
const TAIL_CALL: i32 = 12;

const XDP_ABORTED: i32 = 0;
const XDP_PASS: i32 = 2;
const TC_OK: i32 = 0;
const TC_DROP: i32 = 2;

/// What kind of program it is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    Xdp,
    Tc,
}

impl Hook {
    /// Where `data` and `data_end` stand in the context (`xdp_md`, `__sk_buff`).
    fn data(self) -> (i16, i16) {
        match self {
            Self::Xdp => (0, 4),
            Self::Tc => (76, 80),
        }
    }

    /// The answers for a frame that passes and for one that is too short.
    fn answers(self) -> (i32, i32) {
        match self {
            Self::Xdp => (XDP_PASS, XDP_ABORTED),
            Self::Tc => (TC_OK, TC_DROP),
        }
    }
}

/// One instruction, as the kernel takes it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    pub code: u8,
    /// Destination in the lower half, source in the upper.
    pub registers: u8,
    pub offset: i16,
    pub immediate: i32,
}

const _: () = assert!(size_of::<Instruction>() == 8);

// Opcodes: class, size or operation, mode or source, in one byte.
const LOAD_U32: u8 = 0x61; // LDX | MEM | W
const LOAD_U64: u8 = 0x79; // LDX | MEM | DW
const STORE_U16: u8 = 0x6b; // STX | MEM | H
const STORE_U64: u8 = 0x7b; // STX | MEM | DW
const STORE_U32_IMMEDIATE: u8 = 0x62; // ST | MEM | W
const LOAD_U64_IMMEDIATE: u8 = 0x18; // LD | IMM | DW, two slots
const MOVE: u8 = 0xbf; // ALU64 | MOV | X
const MOVE_IMMEDIATE: u8 = 0xb7; // ALU64 | MOV | K
const ADD_IMMEDIATE: u8 = 0x07;
const AND_IMMEDIATE: u8 = 0x57;
const OR_IMMEDIATE: u8 = 0x47;
const XOR_IMMEDIATE: u8 = 0xa7;
const SHIFT_RIGHT_IMMEDIATE: u8 = 0x77;
const TO_BIG_ENDIAN: u8 = 0xdc; // ALU | END | BE, width in the immediate
const JUMP_IF_GREATER: u8 = 0x2d; // JMP | JGT | X
const CALL: u8 = 0x85; // JMP | CALL
const EXIT: u8 = 0x95;

/// In the source field of `LOAD_U64_IMMEDIATE`: the immediate is a map's file
/// descriptor, and the address of its value is wanted (`BPF_PSEUDO_MAP_VALUE`).
const MAP_VALUE: u8 = 2;
/// The same, but the map itself is wanted (`BPF_PSEUDO_MAP_FD`).
const MAP: u8 = 1;

/// `counter` is the file descriptor of an array map with one `u64`; flows are
/// counted from there, and repeat after `flows` (a power of two). `next` is that of
/// a program array, whose first program gets the frame next.
pub fn instructions(
    hook: Hook,
    template: &Template,
    flows: u32,
    counter: i32,
    next: Option<i32>,
) -> Vec<Instruction> {
    assert!(flows.is_power_of_two(), "{flows} flows");
    let (data, data_end) = hook.data();
    let (pass, too_short) = hook.answers();
    let mut code = vec![
        op(LOAD_U32, DATA, CONTEXT, data, 0),
        op(LOAD_U32, DATA_END, CONTEXT, data_end, 0),
        op(MOVE, LIMIT, DATA, 0, 0),
        op(ADD_IMMEDIATE, LIMIT, 0, 0, FRAME_BYTES as i32),
    ];
    let gate = code.len();
    code.push(op(JUMP_IF_GREATER, LIMIT, DATA_END, 0, 0)); // its way is filled in below

    for (index, word) in template.bytes.chunks_exact(4).enumerate() {
        let value = i32::from_ne_bytes([word[0], word[1], word[2], word[3]]);
        code.push(op(STORE_U32_IMMEDIATE, DATA, 0, (index * 4) as i16, value));
    }

    code.extend([
        op(LOAD_U64_IMMEDIATE, COUNTER, MAP_VALUE, 0, counter),
        op(0, 0, 0, 0, 0), // the address's upper half: offset 0 into the value
        op(LOAD_U64, FLOW, COUNTER, 0, 0),
        op(MOVE, SCRATCH, FLOW, 0, 0),
        op(ADD_IMMEDIATE, SCRATCH, 0, 0, 1),
        op(STORE_U64, COUNTER, SCRATCH, 0, 0),
        op(AND_IMMEDIATE, FLOW, 0, 0, (flows - 1) as i32),
    ]);
    for word in template.words() {
        code.extend([
            op(MOVE, SCRATCH, FLOW, 0, 0),
            op(SHIFT_RIGHT_IMMEDIATE, SCRATCH, 0, 0, word.shift as i32),
            op(AND_IMMEDIATE, SCRATCH, 0, 0, i32::from(word.mask)),
            op(OR_IMMEDIATE, SCRATCH, 0, 0, i32::from(word.base)),
            op(TO_BIG_ENDIAN, SCRATCH, 0, 0, 16),
            op(STORE_U16, DATA, SCRATCH, word.at as i16, 0),
            op(XOR_IMMEDIATE, SCRATCH, 0, 0, -1),
        ]);
        for at in word.complement_at.into_iter().flatten() {
            code.push(op(STORE_U16, DATA, SCRATCH, at as i16, 0));
        }
    }
    if let Some(next) = next {
        // The context is still in its register: no call has been made before.
        code.extend([
            op(LOAD_U64_IMMEDIATE, ARGUMENT_MAP, MAP, 0, next),
            op(0, 0, 0, 0, 0),
            op(MOVE_IMMEDIATE, ARGUMENT_INDEX, 0, 0, 0),
            op(CALL, 0, 0, 0, TAIL_CALL),
        ]);
    }
    code.extend([op(MOVE_IMMEDIATE, R0, 0, 0, pass), op(EXIT, 0, 0, 0, 0)]);
    code[gate].offset = (code.len() - gate - 1) as i16;
    code.extend([op(MOVE_IMMEDIATE, R0, 0, 0, too_short), op(EXIT, 0, 0, 0, 0)]);
    code
}

fn op(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: source << 4 | destination, offset, immediate }
}
