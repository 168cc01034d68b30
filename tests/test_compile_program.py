"""What is read from a program: the text that XLA compiled, with its loops and collectives, and the traced arithmetic."""

import jax
import jax.numpy as jnp
import pytest

from t5x_cpm.compile import program

HLO = """
HloModule jit_step, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%slice_of (p0: f32[6,100], p1: s32[]) -> f32[1,100] {
  %p0 = f32[6,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %part = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,100}
}

%body (state: (s32[], f32[6,100])) -> (s32[], f32[6,100]) {
  %state = (s32[], f32[6,100]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[6,100]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %row = f32[1,100]{1,0} fusion(%x, %i), kind=kLoop, calls=%slice_of
  %gathered = f32[4,100]{1,0} all-gather(%row), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %next = (s32[], f32[6,100]{1,0:T(8,128)}) tuple(%i, %x)
}

%condition (state: (s32[], f32[6,100])) -> pred[] {
  %state = (s32[], f32[6,100]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %six = s32[]{:T(128)} constant(6)
  ROOT %less = pred[]{:T(512)} compare(%i, %six), direction=LT
}

ENTRY %main (x: f32[6,100]) -> f32[100] {
  %x = f32[6,100]{1,0:T(8,128)} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[6,100]{1,0:T(8,128)}) tuple(%zero, %x)
  %loop = (s32[], f32[6,100]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  %y = bf16[100]{0:T(128)S(1)} bitcast(%x)
  %send = (bf16[100]{0}, bf16[100]{0}, u32[], u32[]) collective-permute-start(%y), source_target_pairs={{0,1},{1,0}}
  ROOT %sum = f32[100]{0} all-reduce(%y), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
}
"""


def test_a_program_is_read_with_its_loops():
  read = program.Program(HLO)
  found = {one.kind: one for one in read.collectives()}
  assert found['all-gather'] == program.Collective('all-gather', 3 * 400, 6, (0, 1, 2, 3))
  assert found['all-reduce'] == program.Collective('all-reduce', 200.0, 1, (0, 4))
  assert found['collective-permute'] == program.Collective('collective-permute', 200.0, 1, (0, 1))
  # Six times a row is read and written by the slice, gathered from one to four; then what the last two write: y is no traffic.
  assert read.hbm_bytes() == 6 * (404 + 400 + 400 + 1600) + 2 * 200 + 8 + 400


def test_what_goes_to_other_slices_is_read():
  send = ('  %send.1 = (bf16[100]{0}, u32[]{:S(2)}, token[]) send(%y, %token), channel_id=2, is_host_transfer=true, '
          'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="KIND"}\n')
  for kind, sent in (('ALL_REDUCE', 2 * 3 / 4), ('ALL_GATHER', 3), ('ALL_TO_ALL', 3 / 4)):
    text = HLO.replace('  ROOT %sum', send.replace('KIND', kind) + '  ROOT %sum')
    found = [one for one in program.Program(text).collectives(slices=4) if one.kind == 'between slices']
    assert found == [program.Collective('between slices', 200 * sent, 1, ())]


def test_a_number_of_loops_that_the_compiler_knows_is_taken():
  text = HLO.replace('body=%body\n', 'body=%body, backend_config={"known_trip_count":{"n":"9"}}\n')
  assert {one.kind: one.times for one in program.Program(text).collectives()}['all-gather'] == 9


def test_an_operand_may_be_an_element_of_a_tuple():
  """As XLA writes programs from jaxlib 0.12 on."""
  text = HLO.replace('fusion(%x, %i)', 'fusion(%state#1, %state#0)')
  assert text != HLO and program.Program(text).hbm_bytes() == program.Program(HLO).hbm_bytes()
  text = HLO.replace('all-reduce(%y)', 'all-reduce(%loop#1)')
  found = {one.kind: one for one in program.Program(text).collectives()}
  assert found['all-reduce'].sent == 2 * 2400 / 2
  assert program._element('(s32[]{:T(128)}, (f32[2,3]{1,0}, s8[4]), /*index=2*/bf16[8,5]{1,0:T(8,128)(2,1)S(1)})', 2).endswith(
      'bf16[8,5]{1,0:T(8,128)(2,1)S(1)}')


@pytest.mark.parametrize('text, group', [
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", (0, 1, 2, 3)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(0,2,1)) {'b'}, x", (0, 1)),
    ('replica_groups=[4,2]<=[2,4]T(1,0), x', (0, 4)),
    ('replica_groups={{1,3},{0,2}}', (1, 3)), ('replica_groups={}', ())])
def test_groups_in_all_their_forms(text, group):
  assert program._group(text) == group


def test_arithmetic_counts_loops_and_what_is_computed_again():
  w = jnp.ones((3, 4, 4))

  def layers(w, x):
    return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, w)[0].sum()

  x = jnp.ones((8, 4))
  once = 3 * 2 * 8 * 4 * 4
  assert program.arithmetic(jax.jit(layers).trace(w, x).jaxpr.jaxpr) == once
  assert program.arithmetic(jax.jit(jax.grad(layers)).trace(w, x).jaxpr.jaxpr) == 4 * once
