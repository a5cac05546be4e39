"""The mathematics of any-step generation: pure tensor functions and frozen dataclasses over torch alone.

Conventions, the same in every file:

=================  ==================================================================================================
``clean``          clean normalised latents ``[B, F, C, H, W]``, frames before channels
``noise``          standard normal, same shape
``sigma``          time in [0, 1]: 0 is data, 1 is noise
``timestep``, t    ``1000 * sigma``, the networks' unit: ``[B]``, or ``[B, F]`` where frames differ; float32 or better
``r_timestep``, r  where a jump lands, ``r <= t``, same unit and shape
``z``              ``(1 - sigma) * clean + sigma * noise``, the linear path
``v``              ``noise - clean``, its velocity
``u(z, t, r)``     the network: the mean velocity between t and r; ``u(z, t, t)`` is the instantaneous velocity
flow map           ``z_r = z_t - (sigma_t - sigma_r) * u(z_t, t, r)``
shift, s           ``sigma -> s * sigma / (1 + (s - 1) * sigma)``, applied to every drawn or scheduled sigma
``rows``           whose conditions each row of a call carries: i sample i's, B + i the same without its text
=================  ==================================================================================================

The identity behind training: for the exact map, ``u = v - (t - r) * du/dt``, the total derivative taken along the
path. Random draws and statistics over ranks come in as arguments; losses go out per sample, unreduced. Arithmetic is
float32 or better whatever the network's precision.
"""
