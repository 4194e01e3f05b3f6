"""robosuite's control step (OSC_POSE, 20 Hz over 2 ms substeps), bit for bit, without the work nobody reads."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class ControlStep:
    """Steps a robosuite environment with one Panda under OSC_POSE.

    A substep of robosuite calls `mj_forward`, `mj_forward` again in the controller, then `mj_step`, samples every
    observable and looks up names and limits. Positions and velocities do not change between the three calls, so
    here they are computed once; only the constraint solver runs three times, because each run moves the warm start
    of the next, and without that the states would differ from robosuite's in the last digits.
    """

    def __init__(self, env: Any) -> None:
        import mujoco

        self._mujoco = mujoco
        self._env = env
        self._robot = env.robots[0]
        self._substeps = int(env.control_timestep / env.model_timestep)
        self._model, self._data = env.sim.model._model, env.sim.data._data
        self._site = env.sim.model.site_name2id(self._robot.gripper.important_sites["grip_site"])
        # The sensors (forces at the wrist) are read by nobody and influence nothing.
        self._model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_SENSOR
        self.attach()

    def attach(self) -> None:
        """Take over the controller; robosuite makes a new one at every reset."""
        robot, model = self._robot, self._model
        self._controller = robot.controller
        self._controller.update = self._update
        self._torque_range = robot.torque_limits
        self._arm = robot._ref_joint_actuator_indexes
        self._gripper = robot._ref_joint_gripper_actuator_indexes
        limits = model.actuator_ctrlrange[self._gripper]
        self._gripper_middle = 0.5 * (limits[:, 1] + limits[:, 0])
        self._gripper_scale = 0.5 * (limits[:, 1] - limits[:, 0])

    def __call__(self, action: NDArray[np.floating[Any]]) -> None:
        """Execute one action: (7,), six OSC_POSE deltas in [-1, 1], gripper -1 opens and +1 closes."""
        mujoco, model, data = self._mujoco, self._model, self._data
        controller, gripper = self._controller, self._robot.gripper
        (low, high), control = self._torque_range, data.ctrl
        change = np.array([-1.0, 1.0]) * gripper.speed * np.sign(action[6:])
        opening = gripper.current_action
        for substep in range(self._substeps):
            mujoco.mj_forward(model, data)
            if substep == 0:
                controller.set_goal(action[:6])
            torques = controller.run_controller()
            opening = np.minimum(np.maximum(opening + change, -1.0), 1.0)
            control[self._arm] = np.minimum(np.maximum(torques, low), high)
            control[self._gripper] = self._gripper_middle + self._gripper_scale * opening
            mujoco.mj_step2(model, data)
        gripper.current_action = opening

    def _update(self, force: bool = False) -> None:
        """Replaces `Controller.update`: the same numbers in the same memory layout, each computed once."""
        controller, mujoco, model, data = self._controller, self._mujoco, self._model, self._data
        if not (controller.new_update or force):
            return
        mujoco.mj_forwardSkip(model, data, mujoco.mjtStage.mjSTAGE_VEL, 1)
        velocity, joints = data.qvel, controller.qvel_index
        linear, angular = np.zeros((3, model.nv)), np.zeros((3, model.nv))
        mujoco.mj_jacSite(model, data, linear, angular, self._site)
        controller.ee_pos = data.site_xpos[self._site].copy()
        controller.ee_ori_mat = data.site_xmat[self._site].reshape(3, 3).copy()
        controller.ee_pos_vel = np.dot(linear, velocity)
        controller.ee_ori_vel = np.dot(angular, velocity)
        controller.joint_pos = data.qpos[controller.qpos_index]
        controller.joint_vel = velocity[joints]
        controller.J_pos = linear[:, joints]
        controller.J_ori = angular[:, joints]
        controller.J_full = np.vstack([controller.J_pos, controller.J_ori])
        mass = np.zeros((model.nv, model.nv))
        mujoco.mj_fullM(model, mass, data.qM)
        controller.mass_matrix = mass[joints, :][:, joints]
        controller.new_update = False
